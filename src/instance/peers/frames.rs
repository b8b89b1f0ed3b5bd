//! What is on the wire inside TLS: a length of four bytes, most significant first, and as many bytes.
//!
//! Owns their limit and the hello. Never: makes room for more than [`LIMIT`], whatever a length says.

use std::io;
use std::net::SocketAddr;

use bytes::{Buf as _, BytesMut};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// The longest message, in bytes.
pub const LIMIT: usize = 64 << 10;
const HEADER: usize = 4;

/// First frame of either side.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Hello {
    /// Where its sender listens.
    pub(super) address: SocketAddr,
}

impl Hello {
    pub(super) fn frame(&self) -> io::Result<Vec<u8>> {
        let body = serde_json::to_vec(self)?;
        framed(&body).ok_or_else(|| io::Error::other("the hello is too long"))
    }

    pub(super) fn parse(body: &[u8]) -> io::Result<Self> {
        Ok(serde_json::from_slice(body)?)
    }
}

/// By which the accepting side asks for a new connection in place of this one.
pub(super) const RENEW: [u8; HEADER] = [0; HEADER];

/// A frame with this body, unless it's too long.
pub(super) fn framed(body: &[u8]) -> Option<Vec<u8>> {
    let length = u32::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= LIMIT)?;
    let mut frame = Vec::with_capacity(HEADER + body.len());
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(body);
    Some(frame)
}

/// Puts frames together again.
#[derive(Debug, Default)]
pub(super) struct Reader {
    buffer: BytesMut,
}

impl Reader {
    /// The next frame's body, or `None` at the end. May be given up and called again.
    pub(super) async fn next(
        &mut self,
        stream: &mut (impl AsyncRead + Unpin),
    ) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(body) = self.take()? {
                return Ok(Some(body));
            }
            if stream.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
    }

    fn take(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(header) = self.buffer.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*header)).unwrap_or(usize::MAX);
        if length > LIMIT {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a frame of {length} bytes; {LIMIT} are allowed"),
            ));
        }
        let whole = HEADER + length;
        if self.buffer.len() < whole {
            self.buffer.reserve(whole - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(HEADER);
        let body = self.buffer.split_to(length).to_vec();
        if self.buffer.is_empty() {
            // Not the room of the longest message that ever came, for as long as the connection lives.
            self.buffer = BytesMut::new();
        }
        Ok(Some(body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(work)
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..10),
            cuts in prop::collection::vec(1..50usize, 1..40),
        ) {
            let wire: Vec<u8> = bodies.iter().flat_map(|b| framed(b).unwrap()).collect();
            let mut reader = Reader::default();
            let mut rest = wire.as_slice();
            let mut got = Vec::new();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                rest = later;
                reader.buffer.extend_from_slice(now);
                while let Some(body) = reader.take().unwrap() {
                    got.push(body);
                }
            }
            prop_assert_eq!(got, bodies);
        }
    }

    #[test]
    fn too_long_is_refused_on_both_sides_and_half_is_an_error() {
        assert!(framed(&vec![0; LIMIT]).is_some());
        assert!(framed(&vec![0; LIMIT + 1]).is_none());
        let read = |mut wire: &[u8]| block_on(Reader::default().next(&mut wire));
        let long = u32::try_from(LIMIT + 1).unwrap().to_be_bytes();
        assert_eq!(read(&long).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(read(&[]).unwrap(), None);
        assert_eq!(
            read(&[0, 0, 0, 9, 1]).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
        assert_eq!(read(&RENEW).unwrap(), Some(Vec::new()));
    }
}
