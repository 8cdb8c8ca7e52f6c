//! Streams that the host has opened and not yet named in a request, and those that a request has named before they came.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use super::Stream;
use crate::sync::lock;

/// How many streams may wait: as many as the host can open, since each of many processes at once waits for its last.
const MAX_HELD: usize = 1024;

/// How long a stream may wait, and how long for one.
const PATIENCE: Duration = Duration::from_secs(30);

/// A key that stands for no stream.
#[derive(Debug, thiserror::Error)]
#[error("there is no stdio stream with the key {0:?}")]
pub(crate) struct NotHeld(String);

/// The streams under their keys. Copies share them.
pub(crate) struct HeldStreams<S = Stream>(Arc<Mutex<State<S>>>);

struct State<S> {
    places: HashMap<String, (u64, Place<S>)>,
    /// Tells a place from a later one with the same key.
    serial: u64,
}

enum Place<S> {
    /// It arrives when the host has been told that it is held.
    Stream(oneshot::Receiver<S>),
    /// A request waits for one.
    Wanted(oneshot::Sender<S>),
}

impl<S> Clone for HeldStreams<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> Default for HeldStreams<S> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State { places: HashMap::new(), serial: 0 })))
    }
}

impl<S> State<S> {
    /// Puts something under a key that nothing is under, if there is room: its number.
    fn insert(&mut self, key: &str, place: Place<S>) -> Option<u64> {
        if self.places.len() >= MAX_HELD {
            return None;
        }
        self.serial += 1;
        self.places.insert(key.to_owned(), (self.serial, place));
        Some(self.serial)
    }
}

impl<S: Send + 'static> HeldStreams<S> {
    /// Makes a place for a stream, if there is room and the key is not taken.
    pub(crate) fn reserve(&self, key: &str) -> Option<oneshot::Sender<S>> {
        let mut state = lock(&self.0);
        match state.places.remove(key) {
            Some((_, Place::Wanted(place))) => return Some(place),
            Some(held) => {
                state.places.insert(key.to_owned(), held);
                return None;
            }
            None => {}
        }
        let (place, arrival) = oneshot::channel();
        let serial = state.insert(key, Place::Stream(arrival))?;
        drop(state);
        let (held, key) = (self.clone(), key.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(PATIENCE).await;
            held.forget(&key, serial);
        });
        Some(place)
    }

    /// Takes the stream with that key, which may be on its way yet; with the empty key none.
    pub(crate) async fn take(&self, key: &str) -> Result<Option<S>, NotHeld> {
        if key.is_empty() {
            return Ok(None);
        }
        let (serial, arrival) = self.find(key).ok_or_else(|| NotHeld(key.to_owned()))?;
        let arrived = timeout(PATIENCE, arrival).await;
        self.forget(key, serial);
        arrived.ok().and_then(Result::ok).map(Some).ok_or_else(|| NotHeld(key.to_owned()))
    }

    /// Where the stream with that key arrives, and the number of its place. Of two who want it the first has it.
    fn find(&self, key: &str) -> Option<(u64, oneshot::Receiver<S>)> {
        let mut state = lock(&self.0);
        match state.places.remove(key) {
            Some((serial, Place::Stream(arrival))) => Some((serial, arrival)),
            Some(wanted) => {
                state.places.insert(key.to_owned(), wanted);
                None
            }
            None => {
                let (place, arrival) = oneshot::channel();
                Some((state.insert(key, Place::Wanted(place))?, arrival))
            }
        }
    }

    fn forget(&self, key: &str, serial: u64) {
        let mut state = lock(&self.0);
        if state.places.get(key).is_some_and(|(other, _)| *other == serial) {
            state.places.remove(key);
        }
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
        let _last = held.reserve("last").unwrap();
        assert!(held.take("another").await.is_err(), "there is no room to wait");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_may_be_faster_than_its_stream() {
        let held = HeldStreams::<u8>::default();
        let arrival = async {
            tokio::time::sleep(PATIENCE / 2).await;
            assert!(held.take("a").await.is_err(), "it is waited for already");
            held.reserve("a").unwrap().send(1).unwrap();
        };
        let (taken, ()) = tokio::join!(held.take("a"), arrival);
        assert_eq!(taken.unwrap(), Some(1));
        assert!(held.take("a").await.is_err(), "it does not come");
        held.reserve("a").unwrap().send(2).unwrap();
        assert_eq!(held.take("a").await.unwrap(), Some(2));
    }

    #[tokio::test]
    async fn a_request_may_be_faster_than_the_answer() {
        let held = HeldStreams::<u8>::default();
        let place = held.reserve("a").unwrap();
        let (taken, ()) = tokio::join!(held.take("a"), async { place.send(1).unwrap() });
        assert_eq!(taken.unwrap(), Some(1));
    }
}
