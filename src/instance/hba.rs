//! Who may connect, and how: `pg_hba.conf` and `pg_ident.conf`.
//!
//! Owns both files' content. Never: lets the superuser or the replication role in over TCP by password, anybody in
//! over TCP without TLS, or a role of a workflow without its certificate.

use crate::api::names::rights::GROUP_ROLE;
use crate::api::names::{REPLICATION_ROLE, SUPERUSER};

/// `pg_hba.conf`.
#[must_use]
pub fn hba() -> String {
    format!(
        "# Written by Domicile; changes are overwritten.\n\
         # The superuser: this instance's manager only, known by its operating system user.\n\
         local all {SUPERUSER} peer map=domicile\n\
         local all all reject\n\
         local replication all reject\n\
         # Nobody without TLS.\n\
         hostnossl all all all reject\n\
         hostnossl replication all all reject\n\
         # Standbys: by the certificate of an instance of this store.\n\
         hostssl replication {REPLICATION_ROLE} all cert map=domicile_instances\n\
         host replication all all reject\n\
         host all {SUPERUSER},{REPLICATION_ROLE} all reject\n\
         # Gateways, workers and the operator, for privacy requests: by a certificate in their role's name, never by\n\
         # password. While there is no such group, this line is nobody's.\n\
         hostssl all +{GROUP_ROLE} all cert\n\
         hostssl all all all scram-sha-256\n"
    )
}

/// `pg_ident.conf`: `os_user` is whom the manager runs as, `store` whose instances may replicate.
///
/// A store's name has only lower-case letters, digits and `-`, so it stands for itself in a pattern.
#[must_use]
pub fn ident(store: &str, os_user: &str) -> String {
    format!(
        "# Written by Domicile; changes are overwritten.\n\
         domicile \"{os_user}\" {SUPERUSER}\n\
         domicile_instances \"/^{store}-[0-9]+$\" {REPLICATION_ROLE}\n"
    )
}

/// The name of `uid` in the text of a passwd file. Read by hand: a statically linked program can't load the
/// C library's name services.
#[must_use]
pub fn user_name(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid) && !name.is_empty() && !name.contains('"'))
            .then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_in_their_order() {
        let rules: Vec<_> = hba()
            .lines()
            .filter(|l| !l.starts_with('#'))
            .map(str::to_owned)
            .collect();
        assert_eq!(
            rules,
            [
                "local all postgres peer map=domicile",
                "local all all reject",
                "local replication all reject",
                "hostnossl all all all reject",
                "hostnossl replication all all reject",
                "hostssl replication domicile_replication all cert map=domicile_instances",
                "host replication all all reject",
                "host all postgres,domicile_replication all reject",
                "hostssl all +domicile_rights all cert",
                "hostssl all all all scram-sha-256",
            ]
        );
    }

    #[test]
    fn an_instance_is_one_of_this_store() {
        assert!(ident("s", "postgres").contains(
            "domicile \"postgres\" postgres\ndomicile_instances \"/^s-[0-9]+$\" domicile_replication\n"
        ));
    }

    #[test]
    fn users_are_read_from_the_passwd_file() {
        let passwd = "root:x:0:0::/root:/bin/sh\npostgres:x:10001:10001::/x:\nbroken\n";
        assert_eq!(user_name(passwd, 10001).as_deref(), Some("postgres"));
        assert_eq!(user_name(passwd, 7), None);
    }
}
