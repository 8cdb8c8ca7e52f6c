//! Real programs, as people run them.

use anyhow::Result;
use conformance::docker::{Docker, HOST4};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![
        case!(node_says_hello).tcg(),
        case!(python_reads_a_volume_and_calls_the_bridge),
        case!(iptables_inside),
        case!(vector_registers_are_a_programs_own),
    ]
}

fn node_says_hello(d: &Docker) -> Result<Outcome> {
    let script = "setTimeout(() => console.log('hello from', process.release.name, process.pid), 1)";
    let output = d.run_debian("", &["node", "-e", script])?.run()?;
    expect_equal("output", output.text(), "hello from node 1")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn python_reads_a_volume_and_calls_the_bridge(d: &Docker) -> Result<Outcome> {
    let listener = std::net::TcpListener::bind((HOST4, 0))?;
    let port = listener.local_addr()?.port();
    let server = std::thread::spawn(move || -> Result<String> {
        let (stream, _) = listener.accept()?;
        Ok(std::io::read_to_string(stream)?)
    });
    d.file("message", "read from a volume")?;
    let script = format!(
        "import socket
s = socket.create_connection(('{HOST4}', {port}), 20)
s.sendall(open('/data/message', 'rb').read())
s.close()
print('sent')"
    );
    let options = format!("--volume {}:/data:ro", d.folder()?.display());
    let output = d.run_debian(&options, &["python3", "-c", &script])?.ok()?;
    let message = server.join().unwrap_or_else(|_| anyhow::bail!("the server panicked"))?;
    expect_equal("message", message.as_str(), "read from a volume")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn iptables_inside(d: &Docker) -> Result<Outcome> {
    let script = "iptables -A OUTPUT -p tcp --dport 9 -j REJECT --reject-with tcp-reset && iptables -S OUTPUT";
    let output = d.run_debian("--cap-add NET_ADMIN", &["sh", "-c", script])?.run()?;
    expect_equal("rules", output.text().lines().count(), 2)?;
    Ok(Outcome::new().see_output("run", &output))
}

/// Four processes on one processor each put something of their own into a register, count, and look for it. They do not ask whether
/// the processor has such registers: what the instruction can reach has to be kept, be it told of or not.
fn vector_registers_are_a_programs_own(d: &Docker) -> Result<Outcome> {
    // vmovdqu ymm15, [rdi]; 1: dec rdx; jnz 1b; vmovdqu [rsi], ymm15; vzeroupper; ret
    let script = "import ctypes, mmap, os
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex('c57e6f3f48ffca75fbc57e7f3ec5f877c3'))
kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong)
keep = kind(ctypes.addressof(ctypes.c_char.from_buffer(code)))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

def lost(number):
    own, out = bytes([number] * 32), ctypes.create_string_buffer(32)
    def once():
        keep(own, out, 1000000)
        return out.raw != own
    return sum(once() for _ in range(400))

def process(number):
    child = os.fork()
    if child == 0:
        os._exit(1 if lost(number) else 0)
    return child

known = {flag for line in open('/proc/cpuinfo') if line.startswith('flags') for flag in line.split()}
ends = [os.waitpid(child, 0)[1] for child in [process(number) for number in range(1, 5)]]
print(sorted(known & {'avx', 'avx2'}), ends)";
    let output = d.run_debian("", &["python3", "-c", script])?.ok()?;
    Ok(Outcome::new().see_output("known, and how they ended", &output))
}
