//! The command line: runc's verbs and options, and what `runvm` adds to them.

mod args;
mod check;
mod events;
mod features;
mod run;
mod show;
mod spec;
mod template;
mod update;

use std::process::ExitCode;

use clap::Parser as _;

use crate::container;
use crate::error::{Error, Result, sentence};
use crate::host::oom;
use crate::monitor::Globals;
use crate::vmm::builtin;
use crate::{log, share};
use args::{Cli, Verb};

pub use features::features;

/// What a usage error and a failed command exit with, as runc does.
const FAILURE: u8 = 1;
/// What a failed `exec` exits with: statuses below it may be the process's.
const EXEC_FAILURE: u8 = 255;

/// The whole command: parse, do, tell.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // The user asked for help, or needs it; a closed terminal needs neither.
            let _ = error.print();
            return if error.use_stderr() { FAILURE.into() } else { ExitCode::SUCCESS };
        }
    };
    let log = cli.log();
    if let Err(error) = log::init(&log) {
        let path = log.file.unwrap_or_default();
        eprintln!("runvm: cannot open --log {}: {error}", path.display());
        return FAILURE.into();
    }
    let failure = if matches!(cli.verb, Verb::Exec(_)) { EXEC_FAILURE } else { FAILURE };
    let done = cli.globals().map_err(Error::from).and_then(|globals| dispatch(&globals, cli.verb));
    match done {
        Ok(status) => status,
        Err(error) => {
            let sentence = sentence(&error);
            if log.file.is_some() {
                tracing::error!("{sentence}");
            }
            eprintln!("runvm: {sentence}");
            failure.into()
        }
    }
}

fn dispatch(globals: &Globals, verb: Verb) -> Result<ExitCode> {
    let done = match verb {
        Verb::Create(args) => container::create(globals, &args.into_create()?).map(drop),
        Verb::Run(args) => return run::run(globals, args).map(Into::into),
        Verb::Start { id } => container::start(globals, &id),
        Verb::Kill { id, signal, all } => container::kill(globals, &id, args::signal_number(&signal)?, all),
        Verb::Delete { id, force } => container::delete(globals, &id, force),
        Verb::Events(args) => events::events(globals, &args),
        Verb::Update(args) => {
            let id = args.id.clone();
            container::update(globals, &id, args.into_resources()?)
        }
        Verb::Pause { id } => container::pause(globals, &id),
        Verb::Resume { id } => container::resume(globals, &id),
        Verb::Exec(args) => return container::exec(globals, &args.into_exec()?).map(Into::into),
        Verb::State { id } => show::state(globals, &id),
        Verb::List { format, quiet } => show::list(globals, format, quiet),
        Verb::Ps { id, format, options } => show::ps(globals, &id, format, &options),
        Verb::Template { action } => template::run(globals, action),
        Verb::Spec { rootless: true, .. } => Err(Error::Usage("spec --rootless: runvm needs root".to_owned())),
        Verb::Spec { bundle, .. } => spec::write(bundle.as_deref()),
        Verb::Features => features::show(),
        Verb::Check { json } => return check::check(globals, json).map(Into::into),
        Verb::Checkpoint { .. } | Verb::Restore { .. } => Err(Error::Usage(
            "a container in a VM cannot be checkpointed or restored: its processes are its guest's, out of CRIU's reach"
                .to_owned(),
        )),
        Verb::Version => print(&format!("runvm {}\n", *args::VERSION)),
        Verb::ShareDaemon => return Ok(share::daemon_main()),
        Verb::OomVictim { bytes } => {
            oom::victim(bytes);
            Ok(())
        }
        Verb::Vm => return Ok(builtin::process_main()),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Writes to stdout; one that is closed is no failure of the command.
fn print(text: &str) -> Result<()> {
    use std::io::Write as _;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::system("write to stdout")(error)),
        _ => Ok(()),
    }
}
