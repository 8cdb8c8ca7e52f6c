//! An agent that turns on its host: PID 1 of the guests of the suite `hostile`.
//!
//! It answers as a good agent does, with no container behind its answers, until the place that its plan names. The plan
//! is the file `/plan`: a place and a [`Fault`], as `CreateContainer silent`.

mod control;
mod fault;
mod wire;

use std::io::{self, Read as _, Write as _};
use std::sync::Arc;
use std::thread;

use control::Control;
use fault::Fault;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

/// Where the agent listens, and where it knocks on the host.
const CHANNEL: u32 = 1023;
/// What a stream is for: requests, a process's stdio, the agent's log.
const CONTROL: u32 = 1024;
const STDIO: u32 = 1025;
const LOG: u32 = 1026;

/// What goes wrong, and where: at a method of the agent's, or one of these.
struct Plan {
    place: String,
    fault: Fault,
}

/// Before it says that it listens.
const KNOCK: &str = "knock";
/// Where a stream for stdio is named.
const HELD: &str = "stdio";
/// In what the container's process writes.
const OUTPUT: &str = "output";
/// In the log.
const LINES: &str = "log";

fn main() {
    // The end of PID 1 is the end of the guest.
    if let Err(error) = serve() {
        eprintln!("evil-agent: {error}");
    }
}

fn serve() -> io::Result<()> {
    let plan = std::fs::read_to_string("/plan")?;
    let (place, fault) = plan.trim().split_once(' ').ok_or(io::ErrorKind::InvalidData)?;
    let plan = Arc::new(Plan { place: place.to_owned(), fault: fault.parse()? });
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, CHANNEL)?;
    if plan.place == KNOCK {
        plan.fault.at_knock();
    }
    // Being refused is the answer.
    let _ = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, CHANNEL);
    let control = Arc::new(Control::default());
    loop {
        let (stream, _) = listener.accept()?;
        let (plan, control) = (plan.clone(), control.clone());
        thread::spawn(move || {
            // A stream that the host closes is over.
            let _ = attend(stream, &plan, &control);
        });
    }
}

fn attend(mut stream: VsockStream, plan: &Plan, control: &Arc<Control>) -> io::Result<()> {
    let mut port = [0; 4];
    stream.read_exact(&mut port)?;
    match u32::from_be_bytes(port) {
        CONTROL => control.serve(stream, plan),
        STDIO => hold(stream, plan, control),
        LOG if plan.place == LINES => plan.fault.commit(&mut stream, 0),
        _ => Fault::Silent.commit(&mut stream, 0),
    }
}

/// Takes a stream of a process's stdio, and keeps it.
fn hold(mut stream: VsockStream, plan: &Plan, control: &Control) -> io::Result<()> {
    let mut length = [0];
    stream.read_exact(&mut length)?;
    let mut key = vec![0; usize::from(length[0])];
    stream.read_exact(&mut key)?;
    if plan.place == HELD {
        return plan.fault.commit(&mut stream, 0);
    }
    stream.write_all(&[1])?;
    if plan.place == OUTPUT && key.ends_with(b"/stdout") {
        return plan.fault.commit(&mut stream, 0);
    }
    control.keep(stream);
    Ok(())
}
