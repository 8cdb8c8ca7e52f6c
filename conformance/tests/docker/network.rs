//! The networks that Docker makes, from both ends.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::command::{eventually, readable_within};
use conformance::docker::{Docker, HOST4, HOST6};
use conformance::nameserver::{KNOWN, KNOWN_ADDRESS};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![
        case!(the_bridge_answers_a_ping).tcg(),
        case!(a_container_reaches_a_server_on_the_bridge).tcg(),
        case!(a_container_reaches_a_server_on_the_bridge_by_ipv6),
        case!(a_server_inside_is_reached_from_the_bridge),
        case!(a_server_inside_is_reached_by_ipv6),
        case!(a_long_stream_each_way),
        case!(a_published_port_is_reached_from_the_host).tcg(),
        case!(a_published_udp_port_is_reached_from_the_host),
        case!(containers_find_each_other_by_name),
        case!(containers_find_each_other_by_name_with_ipv6),
        case!(names_docker_does_not_know_are_asked_outside),
        case!(the_default_bridges_names_are_asked_outside),
        case!(two_networks_are_two_interfaces),
        case!(an_address_of_ones_own),
        case!(mtu_and_mac_are_the_engines),
        case!(routes_are_the_engines),
        case!(network_none_has_a_loopback_only).tcg(),
        case!(network_host),
        case!(network_of_another_container),
    ]
}

const PATIENCE: Duration = Duration::from_secs(90);

/// A server that reads to the end, then answers with what it read in capitals.
fn shouting_server(address: impl Into<IpAddr>) -> Result<(u16, std::thread::JoinHandle<Result<String>>)> {
    let listener = TcpListener::bind((address.into(), 0))?;
    let port = listener.local_addr()?.port();
    let server = std::thread::spawn(move || {
        ensure!(readable_within(listener.as_fd(), PATIENCE)?, "nobody called the server");
        let (mut stream, from) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(&stream), &mut line)?;
        stream.write_all(line.to_uppercase().as_bytes())?;
        Ok(from.ip().to_string())
    });
    Ok((port, server))
}

fn joined<T>(thread: std::thread::JoinHandle<Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| anyhow::bail!("the server panicked"))
}

/// What a server that may not be up yet says to `greeting`.
fn call(address: &str, port: u16, greeting: &str) -> Result<String> {
    let address: IpAddr = address.parse().with_context(|| format!("{address:?} is no address"))?;
    eventually(PATIENCE, &format!("an answer of {address} port {port}"), || {
        let Ok(mut stream) = TcpStream::connect_timeout(&(address, port).into(), Duration::from_secs(2)) else {
            return Ok(None);
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(greeting.as_bytes())?;
        let mut answer = String::new();
        // A published port accepts before the server inside does: then it closes at once.
        let read = stream.read_to_string(&mut answer);
        Ok(read.is_ok_and(|count| count > 0).then_some(answer))
    })
}

/// A server inside: answers each line in capitals.
const INSIDE: &str = "while :; do nc -l -p 80 -e sh -c 'read line; echo $line | tr a-z A-Z'; done";

fn the_bridge_answers_a_ping(d: &Docker) -> Result<Outcome> {
    // The kernel first looks whether anybody else has a new IPv6 address.
    let script = format!(
        "ping -c 1 -W 10 {HOST4} | grep -o '1 packets received';
         for i in 1 2 3 4 5 6 7 8 9; do ping6 -c 1 -W 1 {HOST6} | grep -o '1 packets received' && exit 0; sleep 0.5; done
         ip -6 addr; ip -6 route; ip -6 neigh"
    );
    let output = d.sh("", &script).run()?;
    expect_equal("answers", output.text(), "1 packets received\n1 packets received")?;
    Ok(Outcome::new().see("exit", output.code))
}

fn a_container_reaches_a_server_on_the_bridge(d: &Docker) -> Result<Outcome> {
    let (port, server) = shouting_server(HOST4)?;
    let output = d.sh("", &format!("echo from inside | nc -w 20 {HOST4} {port}; hostname -i")).run()?;
    let from = joined(server)?;
    expect_equal("answer and own address", output.text(), &format!("FROM INSIDE\n{from}"))?;
    Ok(Outcome::new().see("exit", output.code).see("answer", output.stdout.lines().next().unwrap_or_default()))
}

fn a_container_reaches_a_server_on_the_bridge_by_ipv6(d: &Docker) -> Result<Outcome> {
    let (port, server) = shouting_server(HOST6)?;
    let output = d
        .sh(
            "",
            &format!(
                "for i in 1 2 3 4 5 6 7 8 9; do echo from inside | nc -w 20 {HOST6} {port} && exit 0; sleep 0.5; done"
            ),
        )
        .run()?;
    let from = joined(server)?;
    ensure!(from.starts_with("fd00:7276:6d00:1:"), "called from {from}");
    expect_equal("answer", output.text(), "FROM INSIDE")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_server_inside_is_reached_from_the_bridge(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("", INSIDE)?;
    let answer = call(&container.address("IPAddress")?, 80, "to inside\n")?;
    expect_equal("answer", answer.as_str(), "TO INSIDE\n")?;
    Ok(Outcome::new().see("answer", answer))
}

fn a_server_inside_is_reached_by_ipv6(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("", INSIDE)?;
    let answer = call(&container.address("GlobalIPv6Address")?, 80, "to inside\n")?;
    expect_equal("answer", answer.as_str(), "TO INSIDE\n")?;
    Ok(Outcome::new().see("answer", answer))
}

fn a_long_stream_each_way(d: &Docker) -> Result<Outcome> {
    const COUNT: u64 = 8 << 20;
    let listener = TcpListener::bind((HOST4, 0))?;
    let port = listener.local_addr()?.port();
    let server = std::thread::spawn(move || {
        ensure!(readable_within(listener.as_fd(), PATIENCE)?, "nobody called the server");
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let received = std::io::copy(&mut (&stream).take(COUNT), &mut std::io::sink())?;
        std::io::copy(&mut std::io::repeat(b'y').take(COUNT), &mut stream)?;
        Ok(received)
    });
    let script = format!("head -c {COUNT} /dev/zero | nc -w 90 {HOST4} {port} | wc -c");
    let output = d.sh("", &script).run()?;
    let received = joined(server)?;
    expect_equal("bytes out and in", (received, output.text()), (COUNT, &*COUNT.to_string()))?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_published_port_is_reached_from_the_host(d: &Docker) -> Result<Outcome> {
    let mut outcome = Outcome::new();
    for published in ["127.0.0.1::80", "80"] {
        let container = d.start_sh(&format!("--publish {published}"), INSIDE)?;
        let ports = d.docker("port").args([&container.id, "80/tcp"]).ok()?;
        for line in ports.text().lines().filter(|line| !line.starts_with('[')) {
            let (address, port) = line.rsplit_once(':').context("a port follows the address")?;
            let address = if address == "0.0.0.0" { HOST4.to_string() } else { address.to_owned() };
            let answer = call(&address, port.parse()?, "published\n")?;
            expect_equal("answer", answer.as_str(), "PUBLISHED\n")?;
            outcome = outcome.see(&format!("by {address}"), answer);
        }
    }
    Ok(outcome)
}

fn a_published_udp_port_is_reached_from_the_host(d: &Docker) -> Result<Outcome> {
    let script = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 53))
while True:
    data, client = s.recvfrom(2000); s.sendto(data.upper(), client)";
    let name = d.name("udp");
    d.run_debian(&format!("--detach --name {name} --publish 127.0.0.1::53/udp"), &["python3", "-c", script])?.ok()?;
    let port = d.docker("port").args([&name, "53/udp"]).ok()?;
    let address = port.text().to_owned();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let answer = eventually(PATIENCE, "an answer by UDP", || {
        socket.send_to(b"datagram", &address)?;
        let mut buffer = [0; 100];
        Ok(socket.recv(&mut buffer).ok().map(|count| String::from_utf8_lossy(&buffer[..count]).into_owned()))
    })?;
    expect_equal("answer", answer.as_str(), "DATAGRAM")?;
    Ok(Outcome::new().see("answer", answer))
}

fn containers_find_each_other_by_name(d: &Docker) -> Result<Outcome> {
    let network = d.network("")?;
    let (one, two) = (d.name("one"), d.name("two"));
    let server =
        |name: &str| d.start_sh(&format!("--network {network} --name {name} --network-alias alias-{name}"), INSIDE);
    let first = server(&one)?;
    let second = server(&two)?;
    let ask = |name: &str| {
        format!("for i in 1 2 3 4 5 6 7 8 9; do echo by name | nc -w 5 {name} 80 && exit 0; sleep 0.5; done")
    };
    let there = first.exec_sh("", &ask(&two)).run()?;
    let back = second.exec_sh("", &ask(&format!("alias-{one}"))).run()?;
    expect_equal("answers", (there.text(), back.text()), ("BY NAME", "BY NAME"))?;
    let resolver = first.exec("", &["cat", "/etc/resolv.conf"]).ok()?;
    ensure!(resolver.stdout.contains("nameserver 127.0.0.11"), "another name server: {}", resolver.stdout);
    Ok(Outcome::new().see("there", there.code).see("back", back.code).see_output("resolver", &resolver))
}

fn containers_find_each_other_by_name_with_ipv6(d: &Docker) -> Result<Outcome> {
    let network =
        d.network(&format!("--ipv6 --subnet fd00:7276:6d00:{:x}::/64", 0x100 + conformance::suite::next_number()))?;
    let name = d.name("server");
    let _server = d.start_sh(&format!("--network {network} --name {name}"), INSIDE)?;
    let script = format!(
        "address=$(nslookup -type=aaaa {name} | sed -n 's/^Address: *\\(fd00.*\\)/\\1/p');
         for i in 1 2 3 4 5 6 7 8 9; do echo by six | nc -w 5 $address 80 && exit 0; sleep 0.5; done"
    );
    let output = d.sh(&format!("--network {network}"), &script).run()?;
    expect_equal("answer", output.text(), "BY SIX")?;
    Ok(Outcome::new().see("exit", output.code))
}

/// Asks for a name that the outer server knows and for one that nobody does.
fn ask_outside(d: &Docker, options: &str) -> Result<Outcome> {
    let known = d.sh(options, &format!("nslookup -type=a {KNOWN} | tail -n +3")).run()?;
    let unknown = d.sh(options, "nslookup -type=a nobody.rvm.example | tail -n +3").run()?;
    let address = KNOWN_ADDRESS.map(|byte| byte.to_string()).join(".");
    ensure!(known.stdout.contains(&address), "the known name is unknown: {}{}", known.stdout, known.stderr);
    ensure!(unknown.stdout.contains("NXDOMAIN"), "the unknown name is known: {}", unknown.stdout);
    Ok(Outcome::new().see_output("known", &known).see_output("unknown", &unknown))
}

fn names_docker_does_not_know_are_asked_outside(d: &Docker) -> Result<Outcome> {
    let network = d.network("")?;
    ask_outside(d, &format!("--network {network}"))
}

fn the_default_bridges_names_are_asked_outside(d: &Docker) -> Result<Outcome> {
    ask_outside(d, "")
}

fn two_networks_are_two_interfaces(d: &Docker) -> Result<Outcome> {
    let (first, second) = (d.network("")?, d.network("")?);
    let container = d.create(
        &format!("--network {first}"),
        &["sh", "-c", "ip -o -4 address | awk '{ print $2 }' | sort; ip route | grep -c default"],
    )?;
    d.docker("network connect").args([&second, &container.id]).ok()?;
    let output = container.docker("start --attach").run()?;
    expect_equal("interfaces and default routes", output.text(), "eth0\neth1\nlo\n1")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn an_address_of_ones_own(d: &Docker) -> Result<Outcome> {
    let third = 100 + conformance::suite::next_number() % 100;
    let network = d.network(&format!("--subnet 172.30.{third}.0/24"))?;
    let address = format!("172.30.{third}.77");
    let output = d
        .sh(&format!("--network {network} --ip {address}"), "ip -o -4 address show eth0 | awk '{ print $4 }'")
        .run()?;
    expect_equal("address", output.text(), &format!("{address}/24"))?;
    Ok(Outcome::new().see("exit", output.code))
}

fn mtu_and_mac_are_the_engines(d: &Docker) -> Result<Outcome> {
    let network = d.network("--opt com.docker.network.driver.mtu=1300")?;
    let script = "cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address";
    let output = d.sh(&format!("--network {network} --mac-address 02:42:0a:0b:0c:0d"), script).run()?;
    expect_equal("MTU and MAC", output.text(), "1300\n02:42:0a:0b:0c:0d")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn routes_are_the_engines(d: &Docker) -> Result<Outcome> {
    // Containers get addresses of their own, which are no difference.
    let script = "ip route | sed 's/src.*//'; ip -6 route | grep -E '^(default|fd00)' | sed 's/metric.*//' | sort";
    let output = d.sh("", script).run()?;
    ensure!(output.stdout.contains(&format!("default via {HOST4}")), "no default route: {}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn network_none_has_a_loopback_only(d: &Docker) -> Result<Outcome> {
    let output = d
        .sh(
            "--network none",
            "ls /sys/class/net; ip -o address | awk '{ print $2, $4 }'; ping -c 1 127.0.0.1 | grep -c 'bytes from'",
        )
        .run()?;
    ensure!(output.stdout.starts_with("lo\n") && output.stdout.contains("lo 127.0.0.1/8"), "{}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn network_host(d: &Docker) -> Result<Outcome> {
    let output = d.run("--network host", &["ip", "-o", "link", "show", "dev", "rvm0"]).run()?;
    if d.runtime().is_runc() {
        expect_equal("exit code", (output.code, output.stderr.as_str()), (0, ""))?;
    }
    Ok(Outcome::new()
        .see("exit", output.code)
        .see("message", last_sentence(&output.stderr))
        .see("sees the host's bridge", output.stdout.contains("rvm0")))
}

fn network_of_another_container(d: &Docker) -> Result<Outcome> {
    let other = d.start("", &["sleep", "1000"])?;
    let output = d.run(&format!("--network container:{}", other.id), &["hostname", "-i"]).run()?;
    let shared = output.text() == other.address("IPAddress")?;
    Ok(Outcome::new()
        .see("exit", output.code)
        .see("message", last_sentence(&output.stderr))
        .see("has the other's address", shared))
}

/// Docker's message without the frame that it puts around a runtime's sentence.
fn last_sentence(stderr: &str) -> String {
    let line = stderr.lines().find(|line| line.contains("Error response")).unwrap_or_default();
    let line = line.rsplit_once("create failed: ").map_or(line, |(_, rest)| rest);
    line.trim_end_matches(": unknown.").trim_end_matches(": unknown").to_owned()
}
