//! The networks that Podman makes.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use conformance::command::eventually;
use conformance::podman::Podman;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Podman>> {
    vec![
        case!(a_published_port_is_reached_from_the_host).tcg(),
        case!(containers_find_each_other_by_name),
        case!(hosts_that_are_added_are_known),
        case!(network_none_has_a_loopback_only),
        case!(network_host),
        case!(network_of_another_container),
    ]
}

const PATIENCE: Duration = Duration::from_secs(60);

/// A server inside: answers each line in capitals.
pub(crate) const INSIDE: &str = "while :; do nc -l -p 80 -e sh -c 'read line; echo $line | tr a-z A-Z'; done";

/// What a server that may not be up yet answers to `greeting` on a port of the host.
pub(crate) fn call(port: u16, greeting: &str) -> Result<String> {
    eventually(PATIENCE, &format!("an answer on port {port}"), || {
        let Ok(mut stream) = TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, port).into(), Duration::from_secs(2))
        else {
            return Ok(None);
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(greeting.as_bytes())?;
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        Ok(read.is_ok_and(|count| count > 0).then_some(answer))
    })
}

/// A port of the host that nobody has.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn a_published_port_is_reached_from_the_host(p: &Podman) -> Result<Outcome> {
    let port = free_port()?;
    let container = p.start_sh(&format!("--publish 127.0.0.1:{port}:80"), INSIDE)?;
    let answer = call(port, "published\n")?;
    expect_equal("answer", answer.as_str(), "PUBLISHED\n")?;
    let inside = container.exec_sh("", "ip -o -4 address show eth0 | awk '{ print $4 }' | cut -d / -f 1").ok()?;
    expect_equal("address", inside.text(), container.inspect("{{.NetworkSettings.IPAddress}}")?.as_str())?;
    Ok(Outcome::new().see("answer", answer))
}

fn containers_find_each_other_by_name(p: &Podman) -> Result<Outcome> {
    let network = p.network()?;
    let (one, two) = (p.name("one"), p.name("two"));
    let server =
        |name: &str| p.start_sh(&format!("--network {network} --name {name} --network-alias alias-{name}"), INSIDE);
    let (first, second) = (server(&one)?, server(&two)?);
    let ask = |name: &str| {
        format!("for i in 1 2 3 4 5 6 7 8 9; do echo by name | nc -w 5 {name} 80 && exit 0; sleep 0.5; done")
    };
    let there = first.exec_sh("", &ask(&two)).run()?;
    let back = second.exec_sh("", &ask(&format!("alias-{one}"))).run()?;
    expect_equal("answers", (there.text(), back.text()), ("BY NAME", "BY NAME"))?;
    Ok(Outcome::new().see("there", there.code).see("back", back.code))
}

fn hosts_that_are_added_are_known(p: &Podman) -> Result<Outcome> {
    let script = "awk '$2 == \"outside\" { print $1 }' /etc/hosts; cat /etc/resolv.conf; hostname; cat /etc/hostname";
    let options = "--add-host outside:198.51.100.7 --dns 192.0.2.53 --dns-search rvm.example --hostname the-name";
    let output = p.sh(options, script).run()?;
    ensure!(output.stdout.starts_with("198.51.100.7\n"), "{}", output.stdout);
    ensure!(output.text().ends_with("the-name\nthe-name"), "{}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn network_none_has_a_loopback_only(p: &Podman) -> Result<Outcome> {
    let output = p.sh("--network none", "ls /sys/class/net; ping -c 1 127.0.0.1 | grep -c 'bytes from'").run()?;
    expect_equal("interfaces and answers", output.text(), "lo\n1")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn network_host(p: &Podman) -> Result<Outcome> {
    let output = p.run("--network host", &["true"]).run()?;
    Ok(Outcome::new().see("exit", output.code).see("message", output.stderr))
}

fn network_of_another_container(p: &Podman) -> Result<Outcome> {
    let other = p.start("", &["sleep", "1000"])?;
    let output = p.run(&format!("--network container:{}", other.id), &["true"]).run()?;
    Ok(Outcome::new().see("exit", output.code).see("message", output.stderr))
}
