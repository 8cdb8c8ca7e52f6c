//! The channel: what a guest's agent may say on each of its streams.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use runvm::agent::{Agent, AgentError, Creation, Descriptors, Listening, Plan, Relay};
use runvm::bundle::GuestSpec;
use runvm::sandbox::guest_log;
use runvm::vmm::{ByteStream, Channel};
use runvm_protocol::dns::Message;
use runvm_protocol::{agent as wire, mux};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio::runtime::Builder;
use tokio::time::timeout;

/// What a stream holds on its way.
const BUFFER: usize = 64 << 10;
/// Longer than all bounds of the host's together.
const LONG: Duration = Duration::from_secs(3600);
/// The longest sentence of a guest's that may reach an engine, with one of ours around it.
const SENTENCE: usize = 4096 + 256;

/// Does what the input says.
#[expect(clippy::expect_used, reason = "a fuzzer ends where it cannot fuzz")]
pub fn run(data: &[u8]) {
    // Where nobody can go on but by waiting, time passes at once.
    let runtime = Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime");
    // All errors are the end of the input.
    let _ = runtime.block_on(play(&mut Unstructured::new(data)));
}

#[expect(clippy::expect_used, reason = "a guest that says nothing must not keep the host for good")]
async fn play(u: &mut Unstructured<'_>) -> Result<()> {
    // What only listens does so for as long as the guest runs; what asks has a bound.
    match u.int_in_range(0..=7)? {
        0 => drop(timeout(LONG, guest_log::pass_on(Said::any(u)?.stream())).await),
        1 => drop(timeout(LONG, look_ups(Said::any(u)?.stream())).await),
        2 => drop(timeout(LONG, multiplexed(Said::any(u)?)).await),
        _ => timeout(LONG, agent(Guest::new(u)?)).await.expect("an end"),
    }
    Ok(())
}

async fn look_ups(mut stream: ByteStream) {
    while let Ok(Some(_)) = Message::read(&mut stream).await {}
}

/// Streams over one, as over a serial line.
async fn multiplexed(guest: Said) {
    let (opener, driver) = mux::host(guest.stream());
    let driving = tokio::spawn(driver.run());
    for _ in 0..3 {
        let Ok(mut stream) = opener.open().await else { break };
        let exchange = async {
            stream.write_all(b"hello").await?;
            stream.read(&mut [0; 64]).await
        };
        // A stream that is silent is no matter.
        let _ = timeout(Duration::from_secs(1), exchange).await;
    }
    driving.abort();
}

/// A container's life, as far as the guest lets it come.
async fn agent(guest: Guest) {
    let Ok(agent) = Agent::connect(Arc::new(guest)).await else { return };
    if let Err(error) = live(&agent).await {
        let sentence = error.to_string();
        assert!(sentence.len() <= SENTENCE, "a sentence of {} bytes", sentence.len());
        assert!(!sentence.contains(char::is_control), "{sentence:?}");
    }
}

async fn live(agent: &Agent) -> std::result::Result<(), AgentError> {
    // Its bound is the caller's.
    let boot = Duration::from_secs(60);
    let (listens, listening) = Listening::not_yet();
    let configured = async {
        let request = wire::ConfigureSandboxRequest::default();
        timeout(boot, agent.configure_sandbox(request)).await.unwrap_or(Ok(()))?;
        let _ = listens.send(true);
        Ok(())
    };
    let descriptors = descriptors().map_err(AgentError::Channel)?;
    let creation = Creation::new("id", &GuestSpec::default(), None, Plan::of(&descriptors))?;
    let ((), streams) = tokio::try_join!(configured, agent.create_container(&creation, listening))?;
    agent.start_container("id").await?;
    let relay = Relay::join(descriptors, streams).start();
    let ended = timeout(boot, agent.wait_process("id", ""));
    if let Ok(exit) = ended.await {
        relay.drained(exit?.output).await;
    }
    Ok(())
}

fn descriptors() -> io::Result<Descriptors> {
    let null: OwnedFd = File::options().read(true).write(true).open("/dev/null")?.into();
    Descriptors::terminal(&null)
}

/// A guest whose streams say each what the input has for it, in the order in which they are opened.
struct Guest(Mutex<Vec<Said>>);

impl Guest {
    fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let mut said = Vec::new();
        // Stdin, stdout, lifeline; what is opened first says the most.
        for _ in 0..3 {
            said.push(Said { bytes: [&[1], u.arbitrary::<&[u8]>()?].concat(), ends: u.arbitrary()? });
        }
        said.push(Said { bytes: messages(u)?, ends: u.arbitrary()? });
        Ok(Self(Mutex::new(said)))
    }
}

#[async_trait::async_trait]
impl Channel for Guest {
    async fn open(&self) -> io::Result<ByteStream> {
        let next = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        next.map(Said::stream).ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }
}

/// What comes on a stream, and whether it then ends.
struct Said {
    bytes: Vec<u8>,
    ends: bool,
}

impl Said {
    fn any(u: &mut Unstructured<'_>) -> Result<Self> {
        let ends = u.arbitrary()?;
        Ok(Self { bytes: u.bytes(u.len())?.to_vec(), ends })
    }

    fn stream(self) -> ByteStream {
        let (ours, mut guest) = duplex(BUFFER);
        tokio::spawn(async move {
            // The host may have enough.
            let _ = guest.write_all(&self.bytes).await;
            let _ = if self.ends { guest.shutdown().await } else { Ok(()) };
            // All is heard.
            tokio::io::copy(&mut guest, &mut tokio::io::sink()).await
        });
        Box::new(ours)
    }
}

/// Messages of ttrpc: answers to the requests in turn, and others.
fn messages(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    const RESPONSE: u8 = 2;
    let mut messages = Vec::new();
    for turn in 0..u.int_in_range(1..=8)? {
        let body: &[u8] = u.arbitrary()?;
        let payload = match u.int_in_range(0..=3)? {
            0 => body.to_vec(),
            // A status, and an answer.
            1 => field(1, &[&[8, 13][..], &field(2, body)].concat()),
            _ => field(2, body),
        };
        let usual = u.ratio(7, 8)?;
        let stream = if usual { 2 * turn + 1 } else { u.arbitrary::<u32>()? };
        let kind = if usual { RESPONSE } else { u.int_in_range(0..=4)? };
        let length = if u.ratio(15, 16)? { payload.len() as u32 } else { u.arbitrary()? };
        let flags = if usual { 0 } else { u.arbitrary()? };
        messages.extend([&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, flags], &payload].concat());
    }
    Ok(messages)
}

/// A field of bytes, which are fewer than 2^14.
fn field(tag: u8, bytes: &[u8]) -> Vec<u8> {
    [&[tag << 3 | 2, bytes.len() as u8 | 0x80, (bytes.len() >> 7) as u8], bytes].concat()
}
