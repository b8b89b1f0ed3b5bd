//! The relay: holds packets between regions back for as long as the latency between them is.
//!
//! Runs in the router's namespace; packets reach it through a TUN device, because a rule of
//! `faults` marks them, and leave through the same device. Keeps their order and never holds more
//! than a bounded number of bytes per direction: what doesn't fit is lost, as in a full router.

use crate::faults::{DELAY_LINK, Faults};
use crate::layout::Layout;
use crate::run::sh;
use crate::topology::Region;
use anyhow::{Context, Result};
use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::time::Instant;
use tokio::signal::unix::{SignalKind, signal};

/// What one direction may hold: a second at half a gigabit.
const MAX_BYTES: usize = 64 << 20;
const MTU: u16 = 1500;

/// The packets under way in one direction.
#[derive(Debug, Default)]
struct DelayLine {
    packets: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    lost: u64,
}

impl DelayLine {
    /// Takes a packet in that may leave at `due`, but not before those that came earlier.
    fn push(&mut self, due: Instant, packet: Vec<u8>) {
        if self.bytes + packet.len() > MAX_BYTES {
            self.lost += 1;
            return;
        }
        self.bytes += packet.len();
        let due = self.packets.back().map_or(due, |(last, _)| due.max(*last));
        self.packets.push_back((due, packet));
    }

    fn next_due(&self) -> Option<Instant> {
        self.packets.front().map(|(due, _)| *due)
    }

    /// The first packet, if it may leave.
    fn pop(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.next_due()? > now {
            return None;
        }
        let (_, packet) = self.packets.pop_front()?;
        self.bytes -= packet.len();
        Some(packet)
    }
}

/// The regions a packet goes from and to.
fn regions(packet: &[u8]) -> Option<(Region, Region)> {
    let at = |i: usize| {
        Some(Ipv4Addr::from(
            <[u8; 4]>::try_from(packet.get(i..i + 4)?).ok()?,
        ))
    };
    if packet.first()? >> 4 != 4 {
        return None;
    }
    Some((Region::of(at(12)?)?, Region::of(at(16)?)?))
}

/// Runs until it is told to end. Reads the latencies anew on SIGHUP.
///
/// # Errors
/// If the device can't be made, or fails.
pub async fn serve(layout: &Layout) -> Result<()> {
    let mut faults = Faults::read(layout)?;
    let device = tun_rs::DeviceBuilder::new()
        .name(DELAY_LINK)
        .mtu(MTU)
        .build_async()
        .context("making the TUN device: is there a /dev/net/tun?")?;
    sh(&format!("ip link set {DELAY_LINK} txqueuelen 10000 up")).await?;
    let mut reload = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
    let mut end = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut lines: BTreeMap<(Region, Region), DelayLine> = BTreeMap::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let next = lines.values().filter_map(DelayLine::next_due).min();
        let wait = async {
            match next {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            read = device.recv(&mut buffer) => {
                let size = read.context("reading from the TUN device")?;
                let now = Instant::now();
                if let Some((from, to)) = regions(&buffer[..size]) {
                    let due = now + faults.latency(from, to);
                    lines.entry((from, to)).or_default().push(due, buffer[..size].to_vec());
                }
            }
            () = wait => {}
            _ = reload.recv() => faults = Faults::read(layout)?,
            _ = end.recv() => return Ok(()),
        }
        let now = Instant::now();
        for line in lines.values_mut() {
            while let Some(packet) = line.pop(now) {
                // A packet that the kernel doesn't take is a packet lost on the way.
                if device.send(&packet).await.is_err() {
                    line.lost += 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::REGIONS;
    use std::time::Duration;

    fn packet(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
        let mut p = vec![0x45; 1];
        p.resize(12, 0);
        p.extend(from);
        p.extend(to);
        p
    }

    #[test]
    fn order_is_kept_even_when_the_latency_shrinks() {
        let start = Instant::now();
        let ms = |n| start + Duration::from_millis(n);
        let mut line = DelayLine::default();
        line.push(ms(100), vec![1]);
        line.push(ms(20), vec![2]);
        line.push(ms(150), vec![3]);
        assert_eq!(line.pop(ms(99)), None);
        assert_eq!(line.pop(ms(100)), Some(vec![1]));
        assert_eq!(line.pop(ms(100)), Some(vec![2]));
        assert_eq!(line.pop(ms(100)), None);
        assert_eq!(line.next_due(), Some(ms(150)));
        assert_eq!(line.pop(ms(150)), Some(vec![3]));
        assert_eq!((line.bytes, line.lost), (0, 0));
    }

    #[test]
    fn what_does_not_fit_is_lost() {
        let now = Instant::now();
        let mut line = DelayLine::default();
        line.push(now, vec![0; MAX_BYTES - 1]);
        line.push(now, vec![0; 2]);
        assert_eq!((line.packets.len(), line.lost), (1, 1));
        line.push(now, vec![0; 1]);
        assert_eq!(line.packets.len(), 2);
    }

    #[test]
    fn packets_know_their_regions() {
        let [west, east, _] = REGIONS;
        assert_eq!(
            regions(&packet([198, 18, 1, 1], [198, 19, 4, 9])),
            Some((west, east))
        );
        assert_eq!(regions(&packet([198, 18, 0, 10], [198, 19, 4, 9])), None);
        assert_eq!(regions(&[0x60; 40]), None);
        assert_eq!(regions(&[0x45; 15]), None);
        assert_eq!(regions(&[]), None);
    }
}
