//! A replication session with another instance's PostgreSQL, made before it is needed.
//!
//! Owns the connection, the greeting, and whether it still stands. Never: replicates by itself; believes a server whose
//! certificate isn't in the other's name.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::BytesMut;
use futures::FutureExt as _;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::wire::{self, Frame};
use crate::api::names;
use crate::instance::conninfo::Upstream;
use crate::instance::peers;

/// A session that waits to be used.
pub struct Session {
    /// Where it is.
    pub address: IpAddr,
    /// The connection.
    pub stream: TlsStream<TcpStream>,
    /// What came and wasn't read yet.
    pub buffer: BytesMut,
    /// What the server said of itself, in its own frames.
    pub parameters: Vec<u8>,
}

impl Session {
    /// Connects to `to` under the name that its synchronous rule knows. `silence`: after which it counts as dead.
    ///
    /// # Errors
    /// If it isn't let in.
    pub async fn open(
        to: &Upstream,
        name: &str,
        tls: Arc<ClientConfig>,
        silence: Duration,
    ) -> anyhow::Result<Self> {
        let address = SocketAddr::new(to.address, to.port);
        let socket = peers::socket_for(address)?;
        peers::tune(&socket, silence)?;
        let mut stream = socket.connect(address).await?;
        // Not with its first byte, as a receiver does from 17 on: here nobody waits for it.
        stream.write_all(&wire::TLS).await?;
        ensure!(stream.read_u8().await? == b'S', "it has no TLS");
        let server = ServerName::try_from(to.name.clone())?;
        let mut stream = TlsConnector::from(tls).connect(server, stream).await?;
        stream
            .write_all(&wire::startup(names::REPLICATION_ROLE, name))
            .await?;
        stream.flush().await?;
        let mut buffer = BytesMut::new();
        let mut parameters = Vec::new();
        loop {
            let frame = wire::next(&mut stream, &mut buffer).await?;
            let frame = frame.context("it ended the connection")?;
            match frame.kind() {
                b'R' => ensure!(frame.body() == [0; 4], "it wants a password"),
                b'S' => parameters.extend_from_slice(frame.whole()),
                b'E' => bail!("it refuses: {}", frame.words()),
                b'Z' => break,
                _ => {}
            }
        }
        Ok(Self {
            address: to.address,
            stream,
            buffer,
            parameters,
        })
    }

    /// Whether it has ended, as far as is known here. It says nothing by itself but its end.
    pub fn ended(&mut self) -> bool {
        loop {
            match self.stream.read_buf(&mut self.buffer).now_or_never() {
                None => return self.buffer.first() == Some(&b'E'),
                Some(Ok(0) | Err(_)) => return true,
                Some(Ok(_)) => {}
            }
        }
    }

    /// Asks, several things at once.
    ///
    /// # Errors
    /// As the connection's.
    pub async fn ask(&mut self, commands: &[&str]) -> std::io::Result<()> {
        let all: Vec<u8> = commands.iter().flat_map(|c| wire::query(c)).collect();
        self.stream.write_all(&all).await?;
        self.stream.flush().await
    }

    /// The next frame.
    ///
    /// # Errors
    /// If there is none.
    pub async fn frame(&mut self) -> anyhow::Result<Frame> {
        wire::next(&mut self.stream, &mut self.buffer)
            .await?
            .context("the upstream ended the connection")
    }

    /// The answer to one command, as it came.
    ///
    /// # Errors
    /// As the connection's; that a command is refused is an answer.
    pub async fn answer(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let frame = self.frame().await?;
            all.extend_from_slice(frame.whole());
            ensure!(all.len() <= wire::LIMIT, "an answer that is too long");
            if frame.kind() == b'Z' {
                return Ok(all);
            }
        }
    }
}
