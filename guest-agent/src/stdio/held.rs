//! Streams that the host has opened and not yet named in a request.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;

use super::Stream;
use crate::sync::lock;

/// How many streams may wait: as many as the host can open, since each of many processes at once waits for its last.
const MAX_HELD: usize = 1024;

/// How long a stream may wait.
const PATIENCE: Duration = Duration::from_secs(30);

/// A key that stands for no stream.
#[derive(Debug, thiserror::Error)]
#[error("there is no stdio stream with the key {0:?}")]
pub(crate) struct NotHeld(String);

/// The streams under their keys. Copies share them.
pub(crate) struct HeldStreams<S = Stream>(Arc<Mutex<State<S>>>);

struct State<S> {
    /// Each arrives when the host has been told that it is held.
    streams: HashMap<String, (u64, oneshot::Receiver<S>)>,
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
    /// Makes a place for a stream, if there is room and the key is not taken.
    pub(crate) fn reserve(&self, key: &str) -> Option<oneshot::Sender<S>> {
        let (place, arrival) = oneshot::channel();
        let mut state = lock(&self.0);
        if state.streams.len() >= MAX_HELD {
            return None;
        }
        state.serial += 1;
        let serial = state.serial;
        match state.streams.entry(key.to_owned()) {
            Entry::Occupied(_) => return None,
            Entry::Vacant(entry) => entry.insert((serial, arrival)),
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
        Some(place)
    }

    /// Takes the stream with that key, and with the empty key none.
    pub(crate) async fn take(&self, key: &str) -> Result<Option<S>, NotHeld> {
        if key.is_empty() {
            return Ok(None);
        }
        let held = lock(&self.0).streams.remove(key);
        let (_, arrival) = held.ok_or_else(|| NotHeld(key.to_owned()))?;
        arrival.await.map(Some).map_err(|_| NotHeld(key.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn streams_wait_only_so_long() {
        let held = HeldStreams::<u8>::default();
        held.reserve("a").unwrap().send(1).unwrap();
        held.reserve("b").unwrap().send(2).unwrap();
        assert_eq!(held.take("a").await.unwrap(), Some(1));
        held.reserve("a").unwrap().send(3).unwrap();
        tokio::time::sleep(PATIENCE - Duration::from_secs(1)).await;
        assert_eq!(held.take("a").await.unwrap(), Some(3));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(held.take("b").await.is_err());
    }

    #[tokio::test]
    async fn there_is_room_for_so_many_and_one_of_a_name() {
        let held = HeldStreams::<usize>::default();
        let places: Vec<_> = (0..MAX_HELD).map(|index| held.reserve(&index.to_string()).unwrap()).collect();
        assert!(held.reserve("more").is_none());
        assert_eq!(held.take("").await.unwrap(), None);
        drop(places);
        assert!(held.take("0").await.is_err(), "its stream never came");
        let _place = held.reserve("0").unwrap();
        assert!(held.take("1").await.is_err());
        assert!(held.reserve("0").is_none());
    }

    #[tokio::test]
    async fn a_request_may_be_faster_than_the_answer() {
        let held = HeldStreams::<u8>::default();
        let place = held.reserve("a").unwrap();
        let (taken, ()) = tokio::join!(held.take("a"), async { place.send(1).unwrap() });
        assert_eq!(taken.unwrap(), Some(1));
    }
}
