//! The words of the command line, apart from what they do.

use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use nix::sys::signal::Signal;

use super::events::EventsArgs;
use super::update::UpdateArgs;
use crate::bundle::OCI_VERSION;
use crate::container::{Changes, Create, Exec, ProcessSource};
use crate::error::{Error, Result};
use crate::log::{self, Format};
use crate::monitor::Globals;
use crate::vmm::{self, Configuration, ConfigurationError};

const ROOT: &str = "/run/runvm";

/// In runc's form, without the name.
pub static VERSION: LazyLock<String> =
    LazyLock::new(|| format!("version {}\nspec: {OCI_VERSION}", env!("CARGO_PKG_VERSION")));

/// An OCI container runtime that gives every container its own virtual machine.
///
/// It takes the place of runc: the same verbs, options and files. Each container runs under a kernel of its own, so that
/// what it runs need not be trusted.
///
/// Try it: `mkdir -p b/rootfs && tar -C b/rootfs -xf IMAGE.tar && cd b && runvm spec && runvm run NAME`. With Docker:
/// register this program as a runtime, then `docker run --runtime=runvm IMAGE`. `runvm check` tells what is missing.
#[derive(Debug, Parser)]
#[command(name = "runvm", version = VERSION.as_str(), disable_version_flag = true, max_term_width = 100)]
pub struct Cli {
    /// Folder of the containers' records.
    #[arg(long, value_name = "DIR", default_value = ROOT)]
    root: PathBuf,
    /// File that the log is appended to, instead of stderr.
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// How the log is written.
    #[arg(long, value_enum, default_value = "text", value_name = "FORMAT")]
    log_format: Format,
    /// Log stages and decisions.
    #[arg(long)]
    debug: bool,
    /// File that the guest kernel's console is written to, and the guest's agent logs its decisions; makes the boot slower.
    #[arg(long, value_name = "FILE", env = "RUNVM_GUEST_CONSOLE")]
    guest_console: Option<PathBuf>,
    /// Accepted for runc's sake: cgroup paths in systemd's form are understood without it.
    #[arg(long)]
    systemd_cgroup: bool,
    /// Accepted for runc's sake: containers are not checkpointed.
    #[arg(long, value_name = "FILE", hide = true)]
    criu: Option<PathBuf>,
    /// Accepted for runc's sake; runvm needs root.
    #[arg(long, value_name = "WHEN", default_value = "auto", num_args = 0..=1, default_missing_value = "true")]
    rootless: String,
    /// File that the options below are taken from where they are not given [default: /etc/runvm/config.toml].
    #[arg(long, value_name = "FILE", env = "RUNVM_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    vm: vmm::Arguments,
    /// Print the version.
    #[arg(short, long, short_alias = 'V', action = ArgAction::Version)]
    version: (),
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

impl Cli {
    /// How is logged.
    pub fn log(&self) -> log::Options {
        log::Options { file: self.log.clone(), format: self.log_format, debug: self.debug }
    }

    /// The options that come before the verb. Only for a verb that makes a machine the configuration is read: who has a
    /// mistake in it can still stop what runs.
    ///
    /// # Errors
    /// [`ConfigurationError`].
    pub fn globals(&self) -> std::result::Result<Globals, ConfigurationError> {
        let configuration = match self.verb {
            Verb::Create(_) | Verb::Run(_) | Verb::Check { .. } | Verb::Template { .. } => {
                Configuration::load(self.config.as_deref())?
            }
            _ => Configuration::default(),
        };
        Ok(Globals {
            root: self.root.clone(),
            log: self.log(),
            vm: self.vm.clone().complete(configuration),
            guest_console: self.guest_console.clone(),
        })
    }
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Make a container from a bundle; it waits for `start`.
    Create(CreateArgs),
    /// Run the program of a created container.
    Start {
        /// Container ID.
        id: String,
    },
    /// Create and start a container, wait for its end and delete it.
    Run(RunArgs),
    /// Print a container's state as JSON.
    State {
        /// Container ID.
        id: String,
    },
    /// Send a signal (default SIGTERM) to a container's first process.
    Kill {
        /// Send it to every process of the container.
        #[arg(short, long)]
        all: bool,
        /// Container ID.
        id: String,
        /// A number, or a name with or without SIG.
        #[arg(default_value = "SIGTERM")]
        signal: String,
    },
    /// Delete a stopped container.
    Delete {
        /// Kill it first if it runs; one that does not exist is no error.
        #[arg(short, long)]
        force: bool,
        /// Container ID.
        id: String,
    },
    /// Run a further process in a running container.
    Exec(ExecArgs),
    /// List the host's processes that stand for a container's.
    Ps {
        /// Container ID.
        id: String,
        /// `table` shows what ps(1) says of them, `json` their PIDs.
        #[arg(short, long, value_enum, default_value = "table")]
        format: OutputFormat,
        /// Options for ps(1).
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// List the containers.
    List {
        /// How.
        #[arg(short, long, value_enum, default_value = "table")]
        format: OutputFormat,
        /// IDs only.
        #[arg(short, long)]
        quiet: bool,
    },
    /// Print what a container uses, and when it runs out of memory, as JSON.
    Events(EventsArgs),
    /// Change a running container's limits.
    Update(UpdateArgs),
    /// Have a container's machine rest.
    Pause {
        /// Container ID.
        id: String,
    },
    /// Let a paused container go on.
    Resume {
        /// Container ID.
        id: String,
    },
    /// Manage the machines at rest from which containers' machines are forked.
    Template {
        /// What to do.
        #[command(subcommand)]
        action: super::template::Action,
    },
    /// Write a config.json to begin with.
    Spec {
        /// Folder of the bundle, instead of this one.
        #[arg(short, long)]
        bundle: Option<PathBuf>,
        /// Refused: runvm needs root.
        #[arg(long)]
        rootless: bool,
    },
    /// Print what of the OCI runtime specification is supported, as JSON.
    Features,
    /// Tell whether this machine can run guests, how, and what is missing.
    Check {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Refused: what runs in a VM cannot be checkpointed.
    Checkpoint {
        /// runc's.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
        arguments: Vec<String>,
    },
    /// Refused, as is `checkpoint`.
    Restore {
        /// runc's.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
        arguments: Vec<String>,
    },
    /// Print the version.
    Version,
    /// The virtio-fs daemon of a VM; the monitor starts it.
    #[command(hide = true)]
    ShareDaemon,
    /// The process that the kernel kills to note that a guest's kernel did; the monitor starts it.
    #[command(hide = true)]
    OomVictim { bytes: usize },
    /// The process of a VM; the monitor starts it.
    #[command(hide = true)]
    Vm,
}

/// How lists are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// `create`'s.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Folder of the bundle, instead of this one.
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Socket that gets the terminal's master.
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// File that gets the PID of the process that stands for the container.
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Socket that gets a descriptor (pidfd) of the process that stands for the container.
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Accepted for runc's sake: in the guest pivot_root always works.
    #[arg(long)]
    no_pivot: bool,
    /// Accepted for runc's sake: a guest's keyrings are its own.
    #[arg(long)]
    no_new_keyring: bool,
    /// Number of descriptors from 3 on that its process has as well, to read from and write to.
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// Container ID, unique below the state root.
    id: String,
}

impl CreateArgs {
    /// What is asked for.
    ///
    /// # Errors
    /// [`Error::Usage`] for what a VM cannot have.
    pub fn into_create(self) -> Result<Create> {
        remark_activation();
        Ok(Create {
            id: self.id,
            bundle: self.bundle,
            console_socket: self.console_socket,
            pid_file: self.pid_file,
            pidfd_socket: self.pidfd_socket,
            preserve_fds: self.preserve_fds,
        })
    }
}

/// `run`'s.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Return once the container runs.
    #[arg(short, long)]
    pub detach: bool,
    /// Keep the container's record after its end.
    #[arg(long)]
    pub keep: bool,
    /// Accepted for runc's sake: orphans go to the guest's own init.
    #[arg(long)]
    no_subreaper: bool,
    /// The rest is as for `create`.
    #[command(flatten)]
    pub create: CreateArgs,
}

/// `exec`'s.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// File with the process as JSON, instead of a command.
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Give it a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Return once it runs.
    #[arg(short, long)]
    detach: bool,
    /// `UID[:GID]`.
    #[arg(short, long)]
    user: Option<String>,
    /// Additional group ID; may be repeated.
    #[arg(short = 'g', long, value_name = "GID")]
    additional_gids: Vec<u32>,
    /// `NAME=value`; may be repeated.
    #[arg(short, long)]
    env: Vec<String>,
    /// Working directory.
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Capability to add; may be repeated.
    #[arg(short, long)]
    cap: Vec<String>,
    /// Let it gain no privileges.
    #[arg(long)]
    no_new_privs: bool,
    /// Socket that gets the terminal's master.
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// File that gets the PID of the process that stands for it.
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Socket that gets a descriptor (pidfd) of the process that stands for it.
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Cgroup below the container's, which has to be there.
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<String>,
    /// Number of descriptors from 3 on that it has as well, to read from and write to.
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// Refused: the guest's kernel has no SELinux.
    #[arg(long, value_name = "LABEL", default_value = "", hide_default_value = true)]
    process_label: String,
    /// Refused: the guest's kernel has no AppArmor.
    #[arg(long, value_name = "PROFILE", default_value = "", hide_default_value = true)]
    apparmor: String,
    /// Accepted for runc's sake, and of no use: the VM of a paused container runs nothing.
    #[arg(long)]
    ignore_paused: bool,
    /// Container ID.
    id: String,
    /// The program and its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl ExecArgs {
    /// What is asked for.
    ///
    /// # Errors
    /// [`Error::Usage`] where neither a command nor a file says what to run, and for what a VM cannot have.
    pub fn into_exec(self) -> Result<Exec> {
        remark_activation();
        refuse_label("--process-label", &self.process_label, "SELinux")?;
        refuse_label("--apparmor", &self.apparmor, "AppArmor")?;
        let cgroup = sub_cgroup(&self.cgroup)?;
        let process = match self.process {
            Some(file) => ProcessSource::File(file),
            None if self.command.is_empty() => {
                return Err(Error::Usage("exec needs a command, or --process FILE".to_owned()));
            }
            None => ProcessSource::Like(Changes {
                args: self.command,
                env: self.env,
                cwd: self.cwd,
                user: self.user,
                additional_gids: self.additional_gids,
                caps: self.cap,
                terminal: self.tty,
                no_new_privs: self.no_new_privs.then_some(true),
            }),
        };
        Ok(Exec {
            id: self.id,
            process,
            cgroup,
            detach: self.detach,
            pid_file: self.pid_file,
            pidfd_socket: self.pidfd_socket,
            console_socket: self.console_socket,
            preserve_fds: self.preserve_fds,
        })
    }
}

/// Descriptors that systemd hands down are sockets that listen, on the host. An engine's environment may carry what it was
/// told of its own, so that is no more than remarked.
fn remark_activation() {
    if let Some(count) = std::env::var_os("LISTEN_FDS").filter(|count| count != "0") {
        let count = count.display();
        tracing::warn!("LISTEN_FDS={count} is not followed: a socket that listens cannot be open in a VM");
    }
}

fn refuse_label(option: &str, label: &str, module: &str) -> Result<()> {
    match label {
        "" => Ok(()),
        _ => Err(Error::Usage(format!("{option} {label}: the guest's kernel has no {module}: leave it out"))),
    }
}

/// The one cgroup that runc's `[CONTROLLER:]PATH` can mean in a guest, whose cgroups are of version 2; empty for the
/// container's own.
fn sub_cgroup(given: &[String]) -> Result<String> {
    match given {
        [] => Ok(String::new()),
        [path] if !path.contains(':') => Ok(path.clone()),
        _ => Err(Error::Usage(format!(
            "--cgroup {}: the guest's cgroups are of version 2, whose controllers share one path: give --cgroup PATH once",
            given.join(" --cgroup ")
        ))),
    }
}

/// The number of a signal that a user names.
///
/// # Errors
/// [`Error::Usage`] where there is no such signal.
pub fn signal_number(text: &str) -> Result<u32> {
    let unknown = || Error::Usage(format!("unknown signal \"{text}\": give a number or a name such as SIGTERM"));
    if let Ok(number) = text.parse::<u32>() {
        return (1..=64).contains(&number).then_some(number).ok_or_else(unknown);
    }
    let upper = text.to_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let signal: Signal = name.parse().map_err(|_| unknown())?;
    Ok(signal as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn engines_command_lines_are_understood() {
        for line in [
            "runvm --root /r/moby --log /b/log.json --log-format json --systemd-cgroup create --bundle /b --pid-file /b/p --console-socket /s --no-pivot --preserve-fds 0 id",
            "runvm --root /r start id",
            "runvm --rootless=false --root /r exec --process /p --console-socket /s --detach --pid-file /p id",
            "runvm kill --all id 9",
            "runvm delete --force id",
            "runvm ps --format json id",
            "runvm run -d --keep id",
            "runvm exec -t -u 1:2 -e A=b -- id sh -c x",
            "runvm exec --ignore-paused --cgroup / --apparmor p --process-label l --preserve-fds 2 id sh",
            "runvm update --resources - id",
            "runvm events --stats id",
            "runvm --criu criu checkpoint --image-path /i --leave-running id",
            "runvm restore --image-path /i -d id",
        ] {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn signals_have_numbers_and_names() {
        for (text, number) in [("9", 9), ("SIGKILL", 9), ("term", 15), ("64", 64), ("WINCH", 28)] {
            assert_eq!(signal_number(text).unwrap(), number);
        }
        for text in ["0", "65", "FOO", "-1", ""] {
            assert!(signal_number(text).is_err(), "{text}");
        }
    }
}
