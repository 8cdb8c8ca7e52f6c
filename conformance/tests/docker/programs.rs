//! Real programs, as people run them.

use anyhow::Result;
use conformance::docker::{Docker, HOST4};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![case!(node_says_hello).tcg(), case!(python_reads_a_volume_and_calls_the_bridge), case!(iptables_inside)]
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
