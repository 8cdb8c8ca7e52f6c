//! Interfaces that an engine adds between `create` and `start`, as Docker does from 28 on.
//!
//! A VM that is made in a namespace without any has spare network devices, of which its guest does not know, and behind
//! which there is nothing. Before the container's program is started they are tied to what has come.

use std::fs;
use std::os::fd::OwnedFd;

use super::{Network, NetworkError, attach, scan};

/// How many interfaces may come late.
const COUNT: usize = 4;

/// The ends of the host's of the spare devices, which become taps when they are needed: a tap that ends takes tens of
/// milliseconds, and most containers without a network never get one.
#[derive(Debug, Default)]
pub struct Spares(Vec<Spare>);

#[derive(Debug)]
struct Spare {
    tun: OwnedFd,
    /// Of the tap, once it is one.
    tap: Option<String>,
}

impl Spares {
    /// Makes them in the calling thread's network namespace; them, and what the VM is to have. They are `taps` at once for
    /// a VMM that looks.
    ///
    /// # Errors
    /// Where there is no /dev/net/tun.
    pub fn make(taps: bool) -> Result<(Self, Vec<OwnedFd>), NetworkError> {
        let (mut spares, mut ends) = (Vec::new(), Vec::new());
        for _ in 0..COUNT {
            let tun = attach::open_tun()?;
            let tap = if taps { Some(attach::make_tap(&tun)?) } else { None };
            ends.push(tun.try_clone().map_err(NetworkError::system("duplicate a descriptor"))?);
            spares.push(Spare { tun, tap });
        }
        Ok((Self(spares), ends))
    }

    /// Ties what has come into the calling thread's network namespace to them; what there is for the guest, the first
    /// spare's first. None where nothing has come, or where there are none.
    ///
    /// # Errors
    /// More than there are devices, and those of [`attach`](super::attach()).
    pub async fn tie(&mut self) -> Result<Option<Network>, NetworkError> {
        if self.0.is_empty() || !something_has_come()? {
            return Ok(None);
        }
        let network = scan().await?;
        let (came, spare) = (network.interfaces.len(), self.0.len());
        if came == 0 {
            return Ok(None);
        }
        if came > spare {
            return Err(NetworkError::TooLate { came, spare });
        }
        for (interface, spare) in network.interfaces.iter().zip(&mut self.0) {
            let tap = match spare.tap.take() {
                Some(tap) => tap,
                None => attach::make_tap(&spare.tun)?,
            };
            attach::tie(interface, spare.tap.insert(tap), network.resolver).await?;
        }
        Ok(Some(network))
    }
}

/// A look that costs less than a scan, for the many containers that have no network.
fn something_has_come() -> Result<bool, NetworkError> {
    const LIST: &str = "/proc/thread-self/net/dev";
    let list = fs::read_to_string(LIST).map_err(NetworkError::system(format!("read {LIST}")))?;
    let mut names = list.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
    Ok(names.any(|name| name != "lo" && !name.starts_with(attach::TAP_PREFIX)))
}
