//! Interfaces that an engine adds between `create` and `start`, as Docker does from 28 on.
//!
//! A VM that is made in a namespace without any has spare network devices, of which its guest does not know, over taps to
//! which nothing is tied. Before the container's program is started they are given to what has come.

use std::fs;

use super::{Network, NetworkError, Tap, attach, scan};

/// How many interfaces may come late.
const COUNT: usize = 4;

/// The taps, by their names. They last as long as the VM that has them.
#[derive(Debug, Default)]
pub struct Spares(Vec<String>);

impl Spares {
    /// Makes them in the calling thread's network namespace; them, and what the VM is to have.
    ///
    /// # Errors
    /// Where there is no /dev/net/tun.
    pub fn make() -> Result<(Self, Vec<Tap>), NetworkError> {
        let taps = (0..COUNT).map(|_| attach::loose_tap()).collect::<Result<Vec<_>, _>>()?;
        Ok((Self(taps.iter().map(|tap| tap.name.clone()).collect()), taps))
    }

    /// Ties what has come into the calling thread's network namespace to them; what there is for the guest, the first
    /// tap's first. None where nothing has come, or where there are none.
    ///
    /// # Errors
    /// More than there are devices, and those of [`attach`](super::attach()).
    pub async fn tie(&self) -> Result<Option<Network>, NetworkError> {
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
        for (interface, tap) in network.interfaces.iter().zip(&self.0) {
            attach::tie(interface, tap).await?;
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
