//! The built-in VMM: a machine of `runvm-vmm` in a process of its own.
//!
//! The process is this program again, with the verb `vm`. It is told what to make by a description on its stdin, and
//! gets all that it cannot open itself as descriptors. Before the guest runs it gives up everything else: see
//! [`confinement`]. What the guest could take over with it is the share that it has already.
//!
//! Where there is a template of the same shape the machine is forked from it, and else it boots, and may become one.

mod blank;
mod channel;
pub mod confinement;
mod description;
mod process;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use runvm_vmm::machine::{Flavour, device_word};
use runvm_vmm::virtio::vsock::MAX_CONNECTIONS;

use super::assets::Assets;
use super::parameters::{self, Processors};
use super::probe::{Accelerator, Kvm};
use super::{Channel, Early, Machine, Vm, Vmm, VmmError};
use crate::host::boot_id;
use crate::log;
use crate::share::ShareError;
use crate::template::{self, Draft, FileIdentity, Files, Shape, Store, TemplateError};
pub use blank::Blank;
use channel::Doorway;
use description::{Beginning, Description, FIRST_NIC, Failure, Saving};
pub use process::main as process_main;

/// The verb that makes this program a VM's process.
pub const VERB: &str = "vm";

/// How long a guest may take to give up once more.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(20);
/// How much of what it said is looked at, in bytes.
const MAX_CONSOLE: usize = 4096;

/// The backend.
#[derive(Debug)]
pub struct Builtin {
    assets: Assets,
    templates: template::Use,
    store: Store,
}

impl Builtin {
    /// The backend that boots these kernels, and forks machines from the templates of this store.
    pub fn new(assets: Assets, templates: template::Use, store: Store) -> Self {
        Self { assets, templates, store }
    }

    /// What a template of this machine depends on; none for a machine that has no templates.
    ///
    /// # Errors
    /// [`VmmError`] where a file of the installation is missing.
    pub fn shape(&self, machine: &Machine) -> Result<Option<Shape>, VmmError> {
        // What a guest says while it boots is what its console is wanted for.
        if machine.console.is_some() {
            return Ok(None);
        }
        let identity = |path: &Path| FileIdentity::of(path).map_err(VmmError::Start);
        Ok(Some(Shape {
            boot: boot_id(),
            program: identity(Path::new("/proc/self/exe"))?,
            kernel: identity(&self.assets.kernel(machine.accelerator)?)?,
            initramfs: identity(&self.assets.initramfs()?)?,
            parameters: parameters::builtin(false, Processors::AtBoot),
            kvm: identity(Path::new("/dev/kvm"))?,
            flavour: flavour(machine)?,
            vcpus: machine.vcpus,
            memory: machine.memory,
            nics: machine.nics.len(),
            spare_nics: machine.spare_nics.len(),
        }))
    }

    /// Makes the template for machines like this one, if it is not there yet; its name.
    ///
    /// # Errors
    /// [`VmmError`].
    pub async fn make_template(&self, machine: &Machine) -> Result<String, VmmError> {
        let shape = self.shape(machine)?.ok_or(VmmError::NoTemplates)?;
        if let Some(draft) = self.store.begin(&shape)? {
            let (_, saving) =
                begin(machine, self.booting(machine, None, true)?, Some(draft.files()?), Haste::default()).await?;
            match saving {
                Saving::Done => draft.commit()?,
                Saving::Failed(reason) => return Err(VmmError::Machine(reason)),
                Saving::NotAsked => return Err(VmmError::NoTemplates),
            }
        }
        Ok(shape.key())
    }

    fn booting(&self, machine: &Machine, console: Option<&Path>, save: bool) -> Result<Beginning, VmmError> {
        let processors = if save || machine.vcpus == 1 { Processors::AtBoot } else { Processors::Late };
        Ok(Beginning::Boot {
            kernel: self.assets.kernel(machine.accelerator)?,
            initramfs: self.assets.initramfs()?,
            parameters: parameters::builtin(console.is_some(), processors),
            console: console.map(Path::to_owned),
            save,
        })
    }

    /// Forks the machine from a template's files.
    async fn fork(&self, machine: &Machine, shape: &Shape, files: Files, haste: Haste) -> Result<Vm, VmmError> {
        let key = shape.key();
        match begin(machine, Beginning::Restore, Some(files), haste).await {
            Ok((vm, _)) => {
                log::stage("machine forked");
                Ok(Vm { template: Some(key), ..vm })
            }
            Err(VmmError::Machine(reason)) => Err(TemplateError::Useless { key, reason }.into()),
            Err(error) => Err(error),
        }
    }

    /// Boots the machine, and lets it become a template where that is wanted. Without one the machine is none the worse.
    async fn boot_cold(&self, machine: &Machine, shape: Option<&Shape>, haste: Haste) -> Result<Vm, VmmError> {
        let draft = shape.and_then(|shape| self.store.begin(shape).unwrap_or_else(complain));
        let draft = draft.and_then(|draft| match draft.files() {
            Ok(files) => Some((draft, files)),
            Err(error) => complain(error),
        });
        let (draft, files) = draft.unzip();
        let beginning = self.booting(machine, machine.console.as_deref(), files.is_some())?;
        match begin(machine, beginning, files, haste).await {
            Ok((vm, saving)) => {
                log::stage("machine booted");
                settle(draft, saving);
                Ok(vm)
            }
            Err(VmmError::GaveUp) if machine.console.is_none() => Err(self.last_words(machine).await),
            Err(error) => Err(error),
        }
    }

    /// Boots once more a machine whose guest gave up in silence, with a console, and tells what it said last.
    async fn last_words(&self, machine: &Machine) -> VmmError {
        let silent = VmmError::GaveUp;
        let Ok(console) = tempfile::NamedTempFile::new() else { return silent };
        let Ok(beginning) = self.booting(machine, Some(console.path()), false) else { return silent };
        // One that boots this time, or hangs, has no last words.
        match tokio::time::timeout(LAST_WORDS_LIMIT, begin(machine, beginning, None, Haste::default())).await {
            Ok(Err(VmmError::GaveUp)) => {}
            _ => return silent,
        }
        let said = std::fs::read(console.path()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said[said.len().saturating_sub(MAX_CONSOLE)..]).into_owned();
        match complaint(&said) {
            Some(complaint) => VmmError::Machine(format!("its guest gave up: {complaint}")),
            None => silent,
        }
    }
}

/// What of a kernel's last lines says why: its panic, else the last line.
fn complaint(console: &str) -> Option<String> {
    let lines = console.lines().map(|line| line.split_once("] ").map_or(line, |(_, text)| text).trim());
    let lines: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
    let panic = lines.iter().rev().find(|line| line.starts_with("Kernel panic") || line.starts_with("runvm-agent:"));
    panic.or(lines.last()).map(|line| line.replace(char::is_control, " "))
}

fn complain<T>(error: TemplateError) -> Option<T> {
    tracing::warn!("there is no template for the next machine: {}", crate::error::sentence(&error));
    None
}

/// Keeps a template that was written, and removes one that was not.
fn settle(draft: Option<Draft>, saving: Saving) {
    match (draft, saving) {
        (Some(draft), Saving::Done) => {
            let _ = draft.commit().or_else(|error| complain(error).ok_or(()));
            log::stage("template made");
        }
        (_, Saving::Failed(reason)) => tracing::warn!("there is no template for the next machine: {reason}"),
        (_, Saving::Done | Saving::NotAsked) => {}
    }
}

fn flavour(machine: &Machine) -> Result<Flavour, VmmError> {
    match machine.accelerator {
        Accelerator::Kvm(Kvm::Ordinary) => Ok(Flavour::Ordinary),
        Accelerator::Kvm(Kvm::Pvm) => Ok(Flavour::Pvm),
        Accelerator::Tcg => Err(VmmError::NotKvm),
    }
}

#[async_trait]
impl Vmm for Builtin {
    async fn boot(&self, mut machine: Machine, early: Early) -> Result<Vm, VmmError> {
        let haste = Haste { early: Some(early), blank: machine.blank.take() };
        let shape = match self.templates {
            template::Use::Off => None,
            template::Use::Auto | template::Use::Require => self.shape(&machine)?,
        };
        if let Some(shape) = &shape
            && let Some(files) = self.store.open(shape)
        {
            return self.fork(&machine, shape, files, haste).await;
        }
        if self.templates == template::Use::Require {
            return Err(TemplateError::Missing(shape.as_ref().map_or("its console is shown".into(), Shape::key)).into());
        }
        self.boot_cold(&machine, shape.as_ref(), haste).await
    }
}

/// What spares a start some waiting.
#[derive(Default)]
struct Haste {
    early: Option<Early>,
    blank: Option<Blank>,
}

/// Starts a machine's process, and waits until its guest's agent listens.
async fn begin(
    machine: &Machine,
    beginning: Beginning,
    files: Option<Files>,
    haste: Haste,
) -> Result<(Vm, Saving), VmmError> {
    // What becomes a template has heard nothing when it is written down.
    let becomes_template = matches!(beginning, Beginning::Boot { save: true, .. });
    let description = Description {
        flavour: flavour(machine)?,
        vcpus: machine.vcpus,
        memory: machine.memory,
        exports: machine.exports.clone(),
        macs: machine.all_nics().map(|nic| nic.mac).collect(),
        spare: machine.spare_nics.len(),
        beginning,
    };
    let (doorway, door) = Doorway::pair().map_err(VmmError::Start)?;
    let mut descriptors = vec![door];
    for nic in machine.all_nics() {
        descriptors.push(nic.tap.try_clone().map_err(VmmError::Start)?);
    }
    descriptors.extend(files.into_iter().flat_map(|files| [files.state.into(), files.memory.into()]));
    let Haste { mut early, blank } = haste;
    let mut process = match blank {
        Some(blank) => blank,
        None => Blank::start(&machine.log, machine.cgroup.as_ref())?,
    };
    process.tell(&description, &descriptors).await?;
    drop(descriptors);
    log::stage("vmm started");
    let channel: Arc<dyn Channel> = Arc::new(doorway);
    let mut tell = || early.take().map(|early| early.send(channel.clone()));
    if !becomes_template {
        tell();
    }
    let report = process.report().await?;
    tell();
    let Blank { process, identity, control } = process;
    let words: super::Words = Some(Box::new(control));
    let spare_nics = (0..machine.spare_nics.len()).map(|index| device_word(FIRST_NIC + machine.nics.len() + index));
    let mut vm = Vm {
        process,
        identity,
        share: None,
        words,
        template: None,
        channel,
        streams: MAX_CONNECTIONS,
        spare_nics: spare_nics.collect(),
    };
    match report {
        Some(Ok(saving)) => Ok((vm, saving)),
        Some(Err(Failure::Share(error))) => Err(ShareError::Setup(error).into()),
        Some(Err(Failure::GaveUp)) => Err(VmmError::GaveUp),
        Some(Err(Failure::Machine(reason))) => Err(VmmError::Machine(reason)),
        None => Err(VmmError::Machine(vm.ended().await)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_the_reason_and_else_what_was_said_last() {
        let console =
            "[    0.5] Run /init as init process\n[    0.6] Kernel panic - not syncing: No init\n[    0.7] CPU: 0\n";
        assert_eq!(complaint(console).as_deref(), Some("Kernel panic - not syncing: No init"));
        assert_eq!(complaint("[    0.1] one\ntwo\x1b[0m\n\n").as_deref(), Some("two [0m"));
        assert_eq!(complaint("\n"), None);
    }
}
