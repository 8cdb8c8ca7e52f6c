//! The requests, answered as a good agent would: a process runs until it gets a signal, and an exec's ends at once.

use std::io::{self, Write as _};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use vsock::VsockStream;

use crate::Plan;
use crate::fault::Fault;
use crate::wire::{self, Request, bytes, number, number_field};

/// The request that is answered when a process has ended.
const WAIT: &str = "WaitProcess";
/// The status of what an exec runs.
const OF_EXECS: u64 = 7;

/// What a good agent knows.
#[derive(Default)]
pub(crate) struct Control {
    /// The signal that has ended the container's process.
    signal: Mutex<Option<u64>>,
    ended: Condvar,
    kept: Mutex<Vec<VsockStream>>,
}

impl Control {
    /// Answers on a stream until the host closes it, or the plan's place is reached.
    pub(crate) fn serve(self: &Arc<Self>, mut stream: VsockStream, plan: &Plan) -> io::Result<()> {
        loop {
            let request = Request::read(&mut stream)?;
            if request.method == plan.place {
                match plan.fault {
                    Fault::Silent => continue,
                    Fault::Late(delay) => thread::sleep(delay),
                    // An answer of the right kind that is not true.
                    Fault::Lie => {
                        let lies = [number_field(1, u64::from(u32::MAX)), number_field(3, u64::MAX)].concat();
                        stream.write_all(&wire::success(request.stream, &lies))?;
                        continue;
                    }
                    _ => return plan.fault.commit(&mut stream, request.stream),
                }
            }
            // The host goes on asking on the stream on which it waits.
            let waits = request.method == WAIT;
            let (control, mut stream) = (self.clone(), stream.try_clone()?);
            let mut answer = move || stream.write_all(&wire::success(request.stream, &control.answer(&request)));
            if waits {
                thread::spawn(answer);
            } else {
                answer()?;
            }
        }
    }

    fn answer(&self, request: &Request) -> Vec<u8> {
        match request.method.as_str() {
            "SignalProcess" => {
                *self.signal.lock().unwrap_or_else(PoisonError::into_inner) = Some(number(&request.body, 3));
                self.ended.notify_all();
                Vec::new()
            }
            WAIT if bytes(&request.body, 2).is_empty() => number_field(1, 128 + self.wait()),
            WAIT => number_field(1, OF_EXECS),
            _ => Vec::new(),
        }
    }

    /// Keeps a stream open.
    pub(crate) fn keep(&self, stream: VsockStream) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
    }

    fn wait(&self) -> u64 {
        let mut signal = self.signal.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *signal {
                Some(number) => return number,
                None => signal = self.ended.wait(signal).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}
