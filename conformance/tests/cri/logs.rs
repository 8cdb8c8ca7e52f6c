//! The log files that the kubelet reads.

use std::time::Duration;

use anyhow::{Result, ensure};
use conformance::command::eventually;
use conformance::cri::{Cri, v1};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Cri>> {
    vec![
        case!(lines_have_times_and_streams),
        case!(long_lines_come_in_parts),
        case!(the_last_line_needs_no_end),
        case!(a_terminal_has_one_stream),
        case!(a_log_is_rotated),
        case!(much_is_logged).only_on(crate::MOST),
    ]
}

fn lines_have_times_and_streams(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", &["sh", "-c", "echo one; sleep 0.1; echo two >&2; sleep 0.1; echo 'thr ee'"])?;
    container.wait()?;
    let lines = container.lines()?;
    let seen: Vec<_> = lines.iter().map(|line| (line.stream.as_str(), line.full, line.content.as_str())).collect();
    expect_equal(
        "lines",
        seen.as_slice(),
        &[("stdout", true, "one"), ("stderr", true, "two"), ("stdout", true, "thr ee")],
    )?;
    let times: Vec<_> = lines.iter().map(|line| line.time.clone()).collect();
    ensure!(times.is_sorted() && times.iter().all(|time| time.contains('T')), "{times:?}");
    Ok(Outcome::new().see("lines", format!("{seen:?}")))
}

fn long_lines_come_in_parts(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", &["sh", "-c", "yes | tr -d '\\n' | head -c 40000; echo; echo short"])?;
    container.wait()?;
    let lines = container.lines()?;
    let parts: Vec<_> = lines.iter().map(|line| (line.full, line.content.len())).collect();
    let (last, long) = parts.split_last().unwrap_or((&(false, 0), &[]));
    expect_equal("the last line", *last, (true, 5))?;
    expect_equal("the long line", long.iter().map(|(_, length)| length).sum::<usize>(), 40_000)?;
    ensure!(long.len() > 1 && long[..long.len() - 1].iter().all(|(full, _)| !full), "{parts:?}");
    Ok(Outcome::new().see("parts", format!("{parts:?}")))
}

fn the_last_line_needs_no_end(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", &["printf", "one\\ntwo"])?;
    container.wait()?;
    container.expect_log("two")?;
    let lines: Vec<_> = container.lines()?.into_iter().map(|line| (line.full, line.content)).collect();
    Ok(Outcome::new().see("lines", format!("{lines:?}")))
}

fn a_terminal_has_one_stream(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start_with("main", &["sh", "-c", "tty; echo err >&2"], |config| config.tty = true)?;
    container.wait()?;
    container.expect_log("err")?;
    let lines: Vec<_> = container.lines()?.into_iter().map(|line| (line.stream, line.content)).collect();
    expect_equal("first line", lines[0].1.trim_end(), "/dev/pts/0")?;
    Ok(Outcome::new().see("lines", format!("{lines:?}")))
}

fn a_log_is_rotated(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start(
        "main",
        &["sh", "-c", "echo before; until [ -e /go ]; do sleep 0.1; done; echo after; exec sleep 1000"],
    )?;
    container.expect_log("before")?;
    std::fs::rename(&container.log, container.log.with_extension("old"))?;
    let request = v1::ReopenContainerLogRequest { container_id: container.id.clone() };
    c.client().call(async |mut c| c.reopen_container_log(request).await)?;
    container.sh("touch /go")?;
    container.expect_log("after")?;
    let lines: Vec<_> = container.lines()?.into_iter().map(|line| line.content).collect();
    expect_equal("lines of the new file", lines.as_slice(), &["after".to_owned()])?;
    Ok(Outcome::new().see("lines", lines.join("\n")))
}

fn much_is_logged(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", &["sh", "-c", "seq 100000; seq 100000 >&2; exec sleep 1000"])?;
    let lines = eventually(Duration::from_secs(60), "the last line of each stream", || {
        let lines = container.lines()?;
        let ended = lines.iter().filter(|line| line.content == "100000").count() == 2;
        Ok(ended.then_some(lines))
    })?;
    let count = |stream| lines.iter().filter(|line| line.stream == stream).count();
    expect_equal("lines", (count("stdout"), count("stderr")), (100_000, 100_000))?;
    Ok(Outcome::new().see("lines", lines.len()))
}
