//! What can go wrong at the ledger, told apart by what the caller should do.
//!
//! Never: carries PostgreSQL's message, which can quote a row's values. What PostgreSQL said is its code, five letters.

use tokio_postgres::error::SqlState;

/// Why the ledger didn't do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// It can't be reached, or didn't answer in time, or its answer isn't certain. What was asked may have happened or
    /// not. To be asked again: every call can be repeated.
    #[error("the ledger is unavailable: {0}")]
    Unavailable(&'static str),
    /// It has no room: its disk is full, or it has too many connections. Nothing was done.
    #[error("the ledger has no room: {0}")]
    Full(&'static str),
    /// It refused, and would again. Nothing was done. The code is PostgreSQL's, or begins with `DR` and is the ledger's.
    #[error("the ledger refused: PostgreSQL's error {0}")]
    Refused(String),
}

pub(super) const CONNECTION: &str = "the connection failed";
pub(super) const SLOW: &str = "it didn't answer in time";
pub(super) const STOPS: &str = "it stops or starts";
pub(super) const NO_PRIMARY: &str = "the instance is no primary";
pub(super) const UNCONFIRMED: &str = "the quorum didn't confirm what was written";

impl LedgerError {
    /// Whether the connection it came by should no longer be used.
    pub(super) fn spoils_connection(&self) -> bool {
        matches!(self, Self::Unavailable(why) if [CONNECTION, SLOW, STOPS, NO_PRIMARY].contains(why))
    }
}

/// By PostgreSQL's code; without one, the connection failed.
impl From<&tokio_postgres::Error> for LedgerError {
    fn from(error: &tokio_postgres::Error) -> Self {
        error.code().map_or(Self::Unavailable(CONNECTION), by_code)
    }
}

impl From<tokio_postgres::Error> for LedgerError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::from(&error)
    }
}

fn by_code(code: &SqlState) -> LedgerError {
    match code.code() {
        "53100" => LedgerError::Full("its disk is full"),
        "53200" => LedgerError::Full("its memory is exhausted"),
        "53300" => LedgerError::Full("it has too many connections"),
        "53000" | "53400" => LedgerError::Full("a limit of it is reached"),
        // Stops, starts, is no primary any more.
        "57P01" | "57P02" | "57P03" | "57P04" | "57P05" => LedgerError::Unavailable(STOPS),
        "25006" => LedgerError::Unavailable(NO_PRIMARY),
        "57014" | "55P03" | "25P03" | "25P04" => {
            LedgerError::Unavailable("it took longer than it may")
        }
        "40001" | "40P01" => LedgerError::Unavailable("others were in the way"),
        // The instance manager has yet to make database, role, schema or functions.
        "3D000" | "28000" | "3F000" | "42883" | "42P01" => {
            LedgerError::Unavailable("it isn't prepared: the primary's instance manager does that")
        }
        // A file couldn't be written or read, perhaps for the moment.
        "58000" | "58030" => LedgerError::Unavailable("its disk fails"),
        other if other.starts_with("08") => LedgerError::Unavailable(CONNECTION),
        other => LedgerError::Refused(other.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_told_apart_by_what_to_do() {
        let of = |code: &str| by_code(&SqlState::from_code(code));
        assert!(matches!(of("53100"), LedgerError::Full(_)));
        assert!(matches!(of("53300"), LedgerError::Full(_)));
        for code in ["57P01", "25006", "08006", "40P01", "57014", "42883"] {
            assert!(matches!(of(code), LedgerError::Unavailable(_)), "{code}");
        }
        assert_eq!(of("23514"), LedgerError::Refused("23514".to_owned()));
        assert_eq!(of("DR001"), LedgerError::Refused("DR001".to_owned()));
    }
}
