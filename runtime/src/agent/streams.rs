//! The streams of a process's stdio, until they are joined to something of the host's.

use futures::future::try_join_all;
use runvm_protocol::agent as wire;
use runvm_protocol::ports;

use super::stdio::Descriptors;
use super::{Agent, AgentError};
use crate::host::terminal::Size;
use crate::vmm::ByteStream;

/// Which streams a process has.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    size: Size,
    /// What is read of each, and what is written.
    preserved: Vec<(bool, bool)>,
    lifeline: bool,
}

impl Plan {
    /// For what these are to be joined to.
    pub fn of(descriptors: &Descriptors) -> Self {
        let preserved = descriptors.preserved.iter();
        Self {
            stdin: descriptors.stdin.is_some(),
            stdout: descriptors.stdout.is_some(),
            stderr: descriptors.stderr.is_some(),
            size: descriptors.size,
            preserved: preserved.map(|one| (one.source.is_some(), one.sink.is_some())).collect(),
            lifeline: false,
        }
    }

    /// The same for a process that ends when nobody has its streams any more, or for one that does not.
    pub fn with_lifeline(self, lifeline: bool) -> Self {
        Self { lifeline, ..self }
    }
}

/// The streams of one process.
#[derive(Default)]
pub struct Streams {
    pub(super) stdin: Option<ByteStream>,
    pub(super) stdout: Option<ByteStream>,
    pub(super) stderr: Option<ByteStream>,
    pub(super) preserved: Vec<(Option<ByteStream>, Option<ByteStream>)>,
    pub(super) lifeline: Option<ByteStream>,
}

impl Streams {
    /// Opens them; `key` tells them from any other's. The answer names them to the agent, which may be told before it holds
    /// them.
    ///
    /// # Errors
    /// [`AgentError`].
    pub(super) async fn open(agent: &Agent, key: &str, plan: &Plan) -> Result<(Self, wire::Stdio), AgentError> {
        let (stdin, stdin_key) = open(agent, plan.stdin, format!("{key}/stdin")).await?;
        let (stdout, stdout_key) = open(agent, plan.stdout, format!("{key}/stdout")).await?;
        let (stderr, stderr_key) = open(agent, plan.stderr, format!("{key}/stderr")).await?;
        let (lifeline, lifeline_key) = open(agent, plan.lifeline, format!("{key}/life")).await?;
        let (mut preserved, mut named) = (Vec::new(), Vec::new());
        for (index, &(read, written)) in plan.preserved.iter().enumerate() {
            let (input, input_key) = open(agent, read, format!("{key}/in/{index}")).await?;
            let (output, output_key) = open(agent, written, format!("{key}/out/{index}")).await?;
            preserved.push((input, output));
            named.push(wire::Preserved { input: input_key, output: output_key, ..Default::default() });
        }
        let named = wire::Stdio {
            terminal_rows: plan.size.rows.into(),
            terminal_columns: plan.size.columns.into(),
            stdin: stdin_key,
            stdout: stdout_key,
            stderr: stderr_key,
            lifeline: lifeline_key,
            preserved: named,
            ..Default::default()
        };
        Ok((Self { stdin, stdout, stderr, preserved, lifeline }, named))
    }

    /// Waits until the agent holds all of them.
    ///
    /// # Errors
    /// [`AgentError::Channel`].
    pub(super) async fn held(&mut self) -> Result<(), AgentError> {
        let stdio = [&mut self.stdin, &mut self.stdout, &mut self.stderr, &mut self.lifeline];
        let preserved = self.preserved.iter_mut().flat_map(|(input, output)| [input, output]);
        let all = stdio.into_iter().chain(preserved).flatten();
        try_join_all(all.map(ports::await_hold)).await.map(drop).map_err(AgentError::Channel)
    }
}

/// A stream and its key, which is empty where there is to be none.
async fn open(agent: &Agent, wanted: bool, key: String) -> Result<(Option<ByteStream>, String), AgentError> {
    match wanted {
        true => Ok((Some(agent.open_stdio(&key).await?), key)),
        false => Ok((None, String::new())),
    }
}
