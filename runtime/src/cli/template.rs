//! `runvm template`: the machines at rest from which others are forked.

use clap::{Args, Subcommand};
use serde_json::json;

use super::args::OutputFormat;
use super::print;
use crate::error::Result;
use crate::monitor::{Globals, single_threaded};
use crate::network::{self, namespace};
use crate::sandbox::{SandboxError, Size, spare_nics};
use crate::template::{MAX_TOTAL, Template};
use crate::vmm::assets::Assets;
use crate::vmm::probe::{self, Accelerator};
use crate::vmm::{Builtin, Machine, Nic, VmmError};

const MIB: u64 = 1 << 20;

/// What to do with templates.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// List the templates, the last used one first.
    List {
        /// How.
        #[arg(short, long, value_enum, default_value = "table")]
        format: OutputFormat,
    },
    /// Make the template for containers of one size, so that the first of them need not.
    Create(CreateArgs),
    /// Remove templates. Machines that were forked from them stay.
    Remove {
        /// Their names, as `list` shows them.
        #[arg(required = true)]
        keys: Vec<String>,
    },
    /// Remove the templates that nothing can be forked from any more.
    Prune {
        /// Remove all others too.
        #[arg(short, long)]
        all: bool,
    },
}

/// The size of a machine.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Processors; default: as many as a container without a limit gets.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    vcpus: Option<u32>,
    /// Memory limit of the containers in MiB; default: none.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(4..=1 << 24))]
    memory: Option<u64>,
    /// Network interfaces.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=8))]
    interfaces: u8,
}

/// Does it.
pub fn run(globals: &Globals, action: Action) -> Result<()> {
    let store = globals.vm.store();
    match action {
        Action::List { format } => print(&show(&store.list()?, format)),
        Action::Create(args) => create(globals, &args),
        Action::Remove { keys } => keys.iter().try_for_each(|key| Ok(store.remove(key)?)),
        Action::Prune { all } => {
            let gone = store.prune(if all { 0 } else { MAX_TOTAL })?;
            print(&gone.iter().map(|key| format!("{key}\n")).collect::<String>())
        }
    }
}

fn create(globals: &Globals, args: &CreateArgs) -> Result<()> {
    let choice = probe::choose(globals.vm.accelerator)?;
    if choice.accelerator == Accelerator::Tcg || globals.vm.needs_qemu(choice.accelerator) {
        return Err(SandboxError::from(VmmError::NoTemplates).into());
    }
    let key = single_threaded(async {
        namespace::create().await.map_err(SandboxError::from)?;
        let mut nics = Vec::new();
        for index in 0..usize::from(args.interfaces) {
            let tap = network::loose_tap().map_err(SandboxError::from)?;
            nics.push(Nic { tap: tap.fd, mac: network::device_mac(index) });
        }
        let (_, spare_nics) = spare_nics(nics.len(), false).map_err(SandboxError::from)?;
        let size = Size::for_limits(args.vcpus, args.memory.map(|limit| limit * MIB));
        let machine = Machine {
            accelerator: choice.accelerator,
            vcpus: size.vcpus,
            memory: size.memory,
            exports: Vec::new(),
            nics,
            spare_nics,
            console: None,
            log: globals.log.clone(),
            cgroup: None,
            blank: None,
        };
        let builtin = Builtin::new(Assets::find(), globals.vm.templates, globals.vm.store());
        Ok(builtin.make_template(&machine).await.map_err(SandboxError::from)?)
    })?;
    print(&format!("{key}\n"))
}

fn show(templates: &[Template], format: OutputFormat) -> String {
    match format {
        OutputFormat::Json => format!("{}\n", json!(templates)),
        OutputFormat::Table => {
            let mut text =
                format!("{:<18}{:<7}{:<12}{:<12}{:<10}USABLE\n", "KEY", "VCPUS", "MEMORY", "INTERFACES", "ON DISK");
            for template in templates {
                let shape = template.shape.as_ref();
                let field = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
                text.push_str(&format!(
                    "{:<18}{:<7}{:<12}{:<12}{:<10}{}\n",
                    template.key,
                    field(shape.map(|shape| shape.vcpus.to_string())),
                    field(shape.map(|shape| format!("{} MiB", shape.memory / MIB))),
                    field(shape.map(|shape| shape.nics.to_string())),
                    format!("{} MiB", template.size / MIB),
                    if template.usable { "yes" } else { "no" },
                ));
            }
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_that_cannot_be_read_is_shown_all_the_same() {
        let template = Template { key: "0123456789abcdef".into(), shape: None, size: 5 * MIB, used: 7, usable: false };
        let table = show(std::slice::from_ref(&template), OutputFormat::Table);
        assert!(table.lines().nth(1).unwrap().ends_with("5 MiB     no"), "{table}");
        let list: serde_json::Value = serde_json::from_str(&show(&[template], OutputFormat::Json)).unwrap();
        assert_eq!(list[0]["used"], 7);
    }
}
