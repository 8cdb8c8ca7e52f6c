//! Pods: containers that share the namespaces of one that only waits.

use anyhow::{Result, ensure};
use conformance::podman::Podman;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

use crate::network::{INSIDE, call, free_port};

pub(crate) fn cases() -> Vec<Case<Podman>> {
    vec![
        case!(a_pod_has_its_name_and_its_network).tcg(),
        case!(kube_plays_a_pod_of_one_container),
        case!(a_pod_starts_again),
        case!(a_pod_takes_another_container_when_the_first_has_ended),
        case!(a_pod_of_two_containers),
    ]
}

fn a_pod_has_its_name_and_its_network(p: &Podman) -> Result<Outcome> {
    let port = free_port()?;
    let pod = p.pod(&format!("--publish 127.0.0.1:{port}:80 --hostname the-pod"))?;
    let container = p.start_sh(&format!("--pod {pod}"), INSIDE)?;
    let answer = call(port, "to the pod\n")?;
    expect_equal("answer", answer.as_str(), "TO THE POD\n")?;
    let name = container.exec("", &["hostname"]).ok()?;
    expect_equal("host name", name.text(), "the-pod")?;
    Ok(Outcome::new().see("answer", answer).see_output("name", &name))
}

/// A pod with one container.
fn kube(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {name}
spec:
  containers:
  - name: server
    image: localhost/busybox:latest
    imagePullPolicy: Never
    command: [\"sh\", \"-c\", {INSIDE:?}]
    env: [{{name: GREETING, value: hello}}]
    resources: {{limits: {{memory: 64Mi}}}}
    ports: [{{containerPort: 80, hostIP: 127.0.0.1, hostPort: {port}}}]
"
    )
}

fn kube_plays_a_pod_of_one_container(p: &Podman) -> Result<Outcome> {
    let (port, pod) = (free_port()?, p.name("pod"));
    let played = p.play("pod", &kube(&pod, port))?.run()?;
    ensure!(played.code == 0, "{}{}", played.stdout, played.stderr);
    let answer = call(port, "by kube\n")?;
    expect_equal("answer", answer.as_str(), "BY KUBE\n")?;
    let container = p.container(&format!("{pod}-server"));
    let inside = container.exec_sh("", "hostname; echo $GREETING").ok()?;
    expect_equal("inside", inside.text(), format!("{pod}\nhello").as_str())?;
    let down = p.podman("play kube --down").arg(p.folder().join("pod.yaml")).run()?;
    Ok(Outcome::new().see("answer", answer).see("down", down.code))
}

fn a_pod_starts_again(p: &Podman) -> Result<Outcome> {
    let port = free_port()?;
    let pod = p.pod(&format!("--publish 127.0.0.1:{port}:80"))?;
    p.start_sh(&format!("--pod {pod}"), INSIDE)?;
    let first = call(port, "first\n")?;
    p.podman("pod stop --time 0").arg(&pod).ok()?;
    p.podman("pod start").arg(&pod).ok()?;
    let second = call(port, "second\n")?;
    expect_equal("answers", (first.as_str(), second.as_str()), ("FIRST\n", "SECOND\n"))?;
    Ok(Outcome::new().see("first", first).see("second", second))
}

fn a_pod_takes_another_container_when_the_first_has_ended(p: &Podman) -> Result<Outcome> {
    let pod = p.pod("")?;
    let script = "ip -o -4 address show eth0 | awk '{ print $4 }'; hostname";
    let first = p.sh(&format!("--pod {pod}"), script).ok()?;
    let second = p.sh(&format!("--pod {pod}"), script).ok()?;
    ensure!(first.stdout.starts_with("10."), "no address: {}", first.stdout);
    expect_equal("addresses and names", &first.stdout, &second.stdout)?;
    Ok(Outcome::new().see("same", true))
}

fn a_pod_of_two_containers(p: &Podman) -> Result<Outcome> {
    let pod = p.pod("")?;
    p.start_sh(&format!("--pod {pod}"), INSIDE)?;
    let ask = "for i in 1 2 3 4 5 6 7 8 9; do echo to a neighbour | nc -w 5 127.0.0.1 80 && exit 0; sleep 0.5; done";
    let second = p.sh(&format!("--pod {pod}"), ask).run()?;
    Ok(Outcome::new().see("exit", second.code).see("stdout", second.stdout).see("stderr", second.stderr))
}
