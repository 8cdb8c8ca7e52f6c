//! Streams that the host has opened and not yet named in a request.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use runvm_protocol::mux::ByteStream;

use crate::sync::lock;

/// How many streams may wait.
const MAX_HELD: usize = 64;

/// How long a stream may wait.
const PATIENCE: Duration = Duration::from_secs(30);

/// A key that stands for no stream.
#[derive(Debug, thiserror::Error)]
#[error("there is no stdio stream with the key {0:?}")]
pub(crate) struct NotHeld(String);

/// The streams under their keys. Copies share them.
pub(crate) struct HeldStreams<S = ByteStream>(Arc<Mutex<State<S>>>);

struct State<S> {
    streams: HashMap<String, (u64, S)>,
    /// Tells a stream from a later one with the same key.
    serial: u64,
}

impl<S> Clone for HeldStreams<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> Default for HeldStreams<S> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State { streams: HashMap::new(), serial: 0 })))
    }
}

impl<S: Send + 'static> HeldStreams<S> {
    /// Holds a stream; gives it back where there is no room or the key is taken.
    pub(crate) fn hold(&self, key: &str, stream: S) -> Result<(), S> {
        let mut state = lock(&self.0);
        if state.streams.len() >= MAX_HELD {
            return Err(stream);
        }
        state.serial += 1;
        let serial = state.serial;
        match state.streams.entry(key.to_owned()) {
            Entry::Occupied(_) => return Err(stream),
            Entry::Vacant(place) => place.insert((serial, stream)),
        };
        drop(state);
        let (held, key) = (self.clone(), key.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(PATIENCE).await;
            let mut state = lock(&held.0);
            if state.streams.get(&key).is_some_and(|(other, _)| *other == serial) {
                state.streams.remove(&key);
            }
        });
        Ok(())
    }

    /// Takes the stream with that key, and with the empty key none.
    pub(crate) fn take(&self, key: &str) -> Result<Option<S>, NotHeld> {
        if key.is_empty() {
            return Ok(None);
        }
        let (_, stream) = lock(&self.0).streams.remove(key).ok_or_else(|| NotHeld(key.to_owned()))?;
        Ok(Some(stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn streams_wait_only_so_long() {
        let held = HeldStreams::<u8>::default();
        held.hold("a", 1).unwrap();
        held.hold("b", 2).unwrap();
        assert_eq!(held.take("a").unwrap(), Some(1));
        held.hold("a", 3).unwrap();
        tokio::time::sleep(PATIENCE - Duration::from_secs(1)).await;
        assert_eq!(held.take("a").unwrap(), Some(3));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(held.take("b").is_err());
    }

    #[tokio::test]
    async fn there_is_room_for_so_many_and_one_of_a_name() {
        let held = HeldStreams::<usize>::default();
        held.hold("0", 0).unwrap();
        assert_eq!(held.hold("0", 1), Err(1));
        for index in 1..MAX_HELD {
            held.hold(&index.to_string(), index).unwrap();
        }
        assert_eq!(held.hold("more", 9), Err(9));
        assert_eq!(held.take("").unwrap(), None);
    }
}
