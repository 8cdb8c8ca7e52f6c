//! The name server that the private Docker daemon asks: it knows one name.
//!
//! Without it, what happens to a name that Docker does not know would depend on the
//! machine's own name servers.

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};

/// The name that exists.
pub const KNOWN: &str = "outside.rvm.example";
/// Its address.
pub const KNOWN_ADDRESS: [u8; 4] = [198, 51, 100, 7];

/// A running name server.
pub struct Nameserver {
    socket: Arc<UdpSocket>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Nameserver {
    /// Answers on port 53 of an address.
    pub fn start(address: IpAddr) -> Result<Self> {
        let socket = Arc::new(UdpSocket::bind((address, 53)).context("cannot bind the name server's port")?);
        let ending = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (socket, ending) = (Arc::clone(&socket), Arc::clone(&ending));
            move || serve(&socket, &ending)
        });
        Ok(Self { socket, ending, thread: Some(thread) })
    }
}

impl Drop for Nameserver {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        // Anything that arrives makes the thread look.
        if let Ok(own) = self.socket.local_addr() {
            let _ = self.socket.send_to(&[], own);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, ending: &AtomicBool) {
    let mut buffer = [0; 512];
    while let Ok((count, client)) = socket.recv_from(&mut buffer) {
        if ending.load(Ordering::Relaxed) {
            return;
        }
        if let Some(answer) = answer(&buffer[..count]) {
            let _ = socket.send_to(&answer, client);
        }
    }
}

/// The reply to a query: the address of the known name, an empty answer for its other
/// record types, "no such name" for anything else.
fn answer(query: &[u8]) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    const TYPE_A: [u8; 2] = [0, 1];
    let mut end = HEADER;
    let mut labels = Vec::new();
    while let length @ 1.. = usize::from(*query.get(end)?) {
        labels.push(String::from_utf8_lossy(query.get(end + 1..end + 1 + length)?).to_lowercase());
        end += 1 + length;
    }
    let question = query.get(HEADER..end + 5)?;
    let known = labels.join(".") == KNOWN;
    let address = known && question.ends_with(&[TYPE_A[0], TYPE_A[1], 0, 1]);

    let mut reply = query.get(..2)?.to_vec();
    reply.extend([0x81, if known { 0x80 } else { 0x83 }]);
    reply.extend([0, 1, 0, u8::from(address), 0, 0, 0, 0]);
    reply.extend(question);
    if address {
        // A pointer to the question's name, then type, class, lifetime, length.
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        reply.extend(KNOWN_ADDRESS);
    }
    Some(reply)
}
