//! Other programs in a container: by one call, and over the streaming server.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::cri::{Cri, Forwarded, v1};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, Output, case};

use crate::SLEEP;

pub(crate) fn cases() -> Vec<Case<Cri>> {
    vec![
        case!(exec_has_outputs_and_an_exit_code),
        case!(exec_has_a_time_limit),
        case!(exec_of_what_is_not_there),
        case!(exec_ends_with_its_container),
        case!(exec_prints_much),
        case!(many_execs_at_once).only_on(crate::MOST),
        case!(a_stream_has_stdin_and_an_exit_code),
        case!(a_stream_has_a_terminal),
        case!(many_streams_at_once).only_on(crate::MOST),
        case!(attach_joins_a_container),
        case!(attach_joins_a_terminal).only_on(crate::MOST),
        case!(a_port_is_forwarded),
    ]
}

fn exec_has_outputs_and_an_exit_code(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    let output = container.sh("tr '\\0' ' ' </proc/1/cmdline; echo err >&2; exit 6")?;
    expect_equal("outputs and code", (output.text(), output.stderr.trim(), output.code), ("sleep 1000", "err", 6))?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_has_a_time_limit(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    let began = Instant::now();
    let error = container.exec_within(&["sleep", "3600"], 1).err().context("an hour passed in a second")?.to_string();
    ensure!(began.elapsed() < Duration::from_secs(60), "the limit of a second took {:?}", began.elapsed());
    // A word in brackets does not find itself.
    container.until("ps | grep '[s]leep 1000' && ! ps | grep '[s]leep 3600'")?;
    let kind = error.split(':').next().unwrap_or_default().to_owned();
    Ok(Outcome::new().see("error", kind).see("tells of it", error.contains("timeout 1s exceeded")))
}

fn exec_of_what_is_not_there(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    let error = container.exec(&["no-such-program"]).err().context("a program that is not there ran")?.to_string();
    ensure!(error.contains("no-such-program"), "the error does not name it: {error}");
    Ok(Outcome::new().see("state", container.status()?.state().as_str_name()))
}

fn exec_ends_with_its_container(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    let ended = std::thread::scope(|scope| -> Result<Result<Output>> {
        let exec = scope.spawn(|| container.exec(&["sh", "-c", "touch /in; exec sleep 3600"]));
        container.until("test -e /in")?;
        container.stop(0)?;
        exec.join().ok().context("a thread panicked")
    })??;
    expect_equal("exit code", ended.code, 137)?;
    let late = container.exec(&["true"]);
    ensure!(late.is_err(), "a program ran in a container that had ended");
    Ok(Outcome::new().see("code", ended.code))
}

fn exec_prints_much(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    let output = container.sh("yes 0123456789abcdef | head -n 200000")?;
    expect_equal("bytes", output.stdout.len(), 17 * 200_000)?;
    Ok(Outcome::new().see("bytes", output.stdout.len()))
}

fn many_execs_at_once(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let containers = [pod.start("one", SLEEP)?, pod.start("two", SLEEP)?];
    let codes = std::thread::scope(|scope| {
        let exec = |number: usize| {
            let container = &containers[number % 2];
            move || container.sh(&format!("echo {number}; exit {number}"))
        };
        let threads: Vec<_> = (0..20).map(|number| scope.spawn(exec(number))).collect();
        threads.into_iter().map(|thread| thread.join().ok().context("a thread panicked")?).collect::<Result<Vec<_>>>()
    })?;
    for (number, output) in codes.iter().enumerate() {
        expect_equal("code", output.code, i32::try_from(number)?)?;
        expect_equal("output", output.text(), &number.to_string())?;
    }
    Ok(Outcome::new().see("how many", codes.len()))
}

fn a_stream_has_stdin_and_an_exit_code(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    let mut stream =
        container.exec_stream(&["sh", "-c", "head -c 1000000 | sha256sum; echo err >&2; exit 9"], false)?;
    for _ in 0..100 {
        stream.send([7; 10_000])?;
    }
    let output = stream.finish()?;
    let alone = conformance::Cmd::new("sha256sum").input(vec![7; 1_000_000]).ok()?;
    expect_equal("sum", output.text(), alone.text())?;
    expect_equal("code", output.code, 9)?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn a_stream_has_a_terminal(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    let script =
        "until [ \"$(stty size 2>/dev/null)\" = '33 99' ]; do sleep 0.1; done; tty; read line; echo got $line; exit 5";
    let mut stream = container.exec_stream(&["sh", "-c", script], true)?;
    stream.resize(33, 99)?;
    stream.expect("/dev/pts/0")?;
    stream.send("hello\n")?;
    stream.expect("got hello")?;
    let output = stream.finish()?;
    expect_equal("code", output.code, 5)?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn many_streams_at_once(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    let streams = (0..10).map(|_| container.exec_stream(&["head", "-n", "1"], false)).collect::<Result<Vec<_>>>()?;
    for (number, mut stream) in streams.into_iter().enumerate() {
        stream.send(format!("{number}\n"))?;
        expect_equal("output", stream.finish()?.text(), &number.to_string())?;
    }
    Ok(Outcome::new().see("state", container.status()?.state().as_str_name()))
}

fn attach_joins_a_container(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start_with("main", &["sh", "-c", "while read line; do echo got $line; done"], |config| {
        config.stdin = true;
    })?;
    for attempt in ["first", "second"] {
        let mut stream = container.attach(false)?;
        stream.send(format!("{attempt}\n"))?;
        stream.expect(&format!("got {attempt}"))?;
    }
    container.expect_log("got first\ngot second")?;
    Ok(Outcome::new().see("state", container.status()?.state().as_str_name()))
}

fn attach_joins_a_terminal(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let script = "until [ \"$(stty size)\" = '33 99' ]; do sleep 0.1; done; read line; echo got $line; exit 3";
    let container = pod.start_with("main", &["sh", "-c", script], |config| {
        config.stdin = true;
        config.tty = true;
    })?;
    let mut stream = container.attach(true)?;
    stream.resize(33, 99)?;
    stream.send("hello\n")?;
    stream.expect("got hello")?;
    let status = container.wait()?;
    expect_equal("exit code", status.exit_code, 3)?;
    Ok(Outcome::new().see("code", status.exit_code))
}

fn a_port_is_forwarded(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    // On the pod's loopback: that is what port forwarding is for.
    let serve = "mkdir /www; echo hello >/www/page; exec httpd -f -p 127.0.0.1:8080 -h /www";
    let container = pod.start("main", &["sh", "-c", serve])?;
    container.until("netstat -tln | grep 127.0.0.1:8080")?;
    let request = v1::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![8080] };
    let url = c.client().call(async |mut c| c.port_forward(request).await)?.url;
    let answer = Forwarded::open(&url, 8080)?.ask(b"GET /page HTTP/1.0\r\n\r\n", "hello")?;
    ensure!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    Ok(Outcome::new().see("answer", answer.lines().next().unwrap_or_default()))
}
