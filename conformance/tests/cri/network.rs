//! A pod's network: addresses of its own, one loopback for all its containers.

use std::io::Read;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::cni::{HOST4, HOST6};
use conformance::command::eventually;
use conformance::cri::{Container, Cri, Pod, v1};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

use crate::SLEEP;

pub(crate) fn cases() -> Vec<Case<Cri>> {
    vec![
        case!(a_pod_answers_the_host),
        case!(a_pod_reaches_the_host),
        case!(pods_reach_each_other),
        case!(containers_of_a_pod_share_localhost),
        case!(a_port_of_the_host),
        case!(interfaces_are_as_the_network_made_them),
        case!(a_pod_in_two_networks),
        case!(resolv_conf_is_as_asked_for),
        case!(a_name_and_hosts),
        case!(a_pod_keeps_its_network).only_on(crate::MOST),
    ]
}

/// Starts what answers each connection to a port with a word.
fn answer<'a>(pod: &Pod<'a>, word: &str, port: u16) -> Result<Container<'a>> {
    let container = pod.start(word, &["nc", "-ll", "-p", &port.to_string(), "-e", "echo", word])?;
    container.until(&format!("netstat -tln | grep :{port}"))?;
    Ok(container)
}

/// What a port of an address says, to the host.
fn ask(address: &str, port: u16) -> Result<String> {
    let target = if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") };
    eventually(Duration::from_secs(20), &format!("an answer of {target}"), || {
        let Ok(mut stream) = TcpStream::connect_timeout(&target.parse()?, Duration::from_secs(5)) else {
            return Ok(None);
        };
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut said = String::new();
        Ok(stream.read_to_string(&mut said).ok().map(|_| said.trim().to_owned()))
    })
}

fn both(pod: &Pod<'_>) -> Result<[String; 2]> {
    let addresses = pod.addresses()?;
    let count = addresses.len();
    addresses.try_into().ok().with_context(|| format!("the pod has {count} addresses instead of two"))
}

fn a_pod_answers_the_host(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    answer(&pod, "here", 7000)?;
    let mut outcome = Outcome::new();
    for (family, address) in ["IPv4", "IPv6"].iter().zip(both(&pod)?) {
        let said = ask(&address, 7000)?;
        expect_equal(family, said.as_str(), "here")?;
        outcome = outcome.see(family, said);
    }
    Ok(outcome)
}

fn a_pod_reaches_the_host(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    let mut outcome = Outcome::new();
    for address in [HOST4.to_string(), HOST6.to_string()] {
        let output = container.until(&format!("ping -c 1 -W 5 {address} | grep -o '1 packets received'"))?;
        outcome = outcome.see(&address, output.text());
    }
    Ok(outcome)
}

fn pods_reach_each_other(c: &Cri) -> Result<Outcome> {
    let (one, two) = (c.pod()?, c.pod()?);
    answer(&one, "one", 7000)?;
    answer(&two, "two", 7000)?;
    let mut outcome = Outcome::new();
    for (from, to, word) in [(&one, &two, "two"), (&two, &one, "one")] {
        let container = from.start("asks", SLEEP)?;
        for (family, address) in ["IPv4", "IPv6"].iter().zip(both(to)?) {
            let said = container.until(&format!("nc {address} 7000 </dev/null | grep .",))?;
            expect_equal(family, said.text(), word)?;
            outcome = outcome.see(&format!("{family} to {word}"), said.text());
        }
    }
    Ok(outcome)
}

fn containers_of_a_pod_share_localhost(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    answer(&pod, "neighbour", 7000)?;
    let container = pod.start("asks", SLEEP)?;
    let mut outcome = Outcome::new();
    for address in ["127.0.0.1", "::1"] {
        let said = container.until(&format!("nc {address} 7000 </dev/null | grep ."))?;
        expect_equal(address, said.text(), "neighbour")?;
        outcome = outcome.see(address, said.text());
    }
    // The port is taken for all of the pod.
    let taken = pod.sh("nc -l -p 7000")?;
    ensure!(taken.code != 0, "two containers of a pod listen on one port");
    Ok(outcome.see("taken", taken.stderr))
}

fn a_port_of_the_host(c: &Cri) -> Result<Outcome> {
    let port = 20_000 + u16::try_from(conformance::suite::next_number())?;
    let pod = c.pod_with(|config| config.port_mappings = vec![mapping(port)])?;
    answer(&pod, "mapped", 7000)?;
    let said = ask(&HOST4.to_string(), port)?;
    expect_equal("what the host's port says", said.as_str(), "mapped")?;
    let other = c.pod()?.sh(&format!("nc {HOST4} {port} </dev/null"))?;
    expect_equal("what it says to a pod", other.text(), "mapped")?;
    Ok(Outcome::new().see("to the host", said).see_output("to a pod", &other))
}

fn mapping(port: u16) -> v1::PortMapping {
    v1::PortMapping {
        protocol: v1::Protocol::Tcp.into(),
        container_port: 7000,
        host_port: i32::from(port),
        host_ip: String::new(),
    }
}

fn interfaces_are_as_the_network_made_them(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let [four, six] = both(&pod)?;
    let output =
        pod.sh("ls /sys/class/net | tr '\\n' ' '; cat /sys/class/net/eth0/mtu; ip -4 route; ip address show eth0")?;
    ensure!(output.stdout.contains(&format!("inet {four}/24")), "no {four}: {}", output.stdout);
    ensure!(output.stdout.contains(&format!("inet6 {six}/64")), "no {six}: {}", output.stdout);
    let shown: Vec<_> = output.stdout.lines().take(3).map(|line| line.replace(&four, "<address>")).collect();
    Ok(Outcome::new().see("links and routes", shown.join("\n")))
}

fn a_pod_in_two_networks(c: &Cri) -> Result<Outcome> {
    let (one, two) = (c.pod_in_two_networks()?, c.pod_in_two_networks()?);
    answer(&two, "two", 7000)?;
    let container = one.start("asks", SLEEP)?;
    let mut outcome = Outcome::new().see_output("links", &container.sh("ls /sys/class/net")?);
    ensure!(outcome.get("links stdout") == Some("eth0\neth1\nlo"), "{outcome:?}");
    for link in ["eth0", "eth1"] {
        let address =
            two.sh(&format!("ip -4 -o address show {link} | awk '{{ sub(\"/.*\", \"\", $4); print $4 }}'"))?;
        let said = container.until(&format!("nc {} 7000 </dev/null | grep .", address.text()))?;
        expect_equal(link, said.text(), "two")?;
        outcome = outcome.see(link, said.text());
    }
    Ok(outcome)
}

fn resolv_conf_is_as_asked_for(c: &Cri) -> Result<Outcome> {
    let pod = c.pod_with(|config| {
        config.dns_config = Some(v1::DnsConfig {
            servers: vec!["192.0.2.1".to_owned(), "2001:db8::1".to_owned()],
            searches: vec!["default.svc.rvm.example".to_owned(), "rvm.example".to_owned()],
            options: vec!["ndots:5".to_owned()],
        });
    })?;
    let output = pod.sh("cat /etc/resolv.conf")?;
    ensure!(output.stdout.contains("nameserver 192.0.2.1"), "{}", output.stdout);
    Ok(Outcome::new().see_output("resolv.conf", &output))
}

fn a_name_and_hosts(c: &Cri) -> Result<Outcome> {
    let hosts = c.folder().join("hosts");
    std::fs::write(&hosts, "127.0.0.1 localhost\n192.0.2.7 neighbour.rvm.example\n")?;
    let pod = c.pod_with(|config| config.hostname = "a-name".to_owned())?;
    let output =
        pod.sh_with("hostname; cat /etc/hostname; cat /etc/hosts; cat /proc/sys/kernel/hostname", |config| {
            // The kubelet writes the file itself.
            config.mounts = vec![crate::bind(&hosts, "/etc/hosts")];
        })?;
    ensure!(output.stdout.starts_with("a-name\na-name\n") && output.stdout.contains("neighbour"), "{}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn a_pod_keeps_its_network(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let first = answer(&pod, "first", 7000)?;
    let [four, _] = both(&pod)?;
    expect_equal("answer", ask(&four, 7000)?.as_str(), "first")?;
    first.stop(0)?;
    first.remove()?;
    answer(&pod, "second", 7000)?;
    let said = ask(&four, 7000)?;
    expect_equal("answer of its successor", said.as_str(), "second")?;
    Ok(Outcome::new().see("answer", said))
}
