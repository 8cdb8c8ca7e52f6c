//! Machines that rest, and go on elsewhere, while all of their devices are busy.
//!
//! The guest is `guest.c`, which checks what its devices do and tells of it; see there. Elsewhere is another process:
//! this program again.

mod machine;

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ioctls::Kvm;
use libtest_mimic::{Arguments, Trial};
use machine::{Result, World, echo, hang_up, make_home};

/// Tells this program that it is elsewhere: the machine's home, its files' folder and its processors.
const ELSEWHERE: &str = "RUNVM_SNAPSHOT_ELSEWHERE";
const PAUSES: u32 = 100;
const TRIMS: u32 = 20;

fn main() -> ExitCode {
    if let Ok(place) = env::var(ELSEWHERE) {
        return match elsewhere(&place) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("elsewhere: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let arguments = Arguments::from_args();
    let without_kvm = Kvm::new().is_err();
    let trial = |name: &str, test: fn() -> Result<()>| {
        Trial::test(name, move || test().map_err(|error| error.to_string().into())).with_ignored_flag(without_kvm)
    };
    let trials = vec![
        trial("one_processor_goes_on_elsewhere", || goes_on_elsewhere(1)),
        trial("two_processors_go_on_elsewhere", || goes_on_elsewhere(2)),
        trial("a_restored_machine_is_saved_again", saved_again),
        trial("pauses_are_not_noticed", || is_not_noticed(PAUSES, pause)),
        trial("trimming_is_not_noticed", || is_not_noticed(TRIMS, trim)),
        trial("a_trimmed_machine_is_saved_whole", trimmed),
        trial("on_another_host_the_processors_are_compared", compared),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Saved while everything is busy, a machine goes on in two other processes, with files of their own.
fn goes_on_elsewhere(vcpus: u32) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let home = folder.path().join("home");
    make_home(&home)?;
    let world = World::boot(&home, vcpus)?;
    world.expect_progress(0)?;
    world.use_balloon()?;
    let stream = world.open(b'e')?;
    echo(&stream, 0)?;
    world.machine.pause();
    world.save(&folder.path().join("state"), &folder.path().join("memory"))?;
    let clones = ["one", "two"].map(|name| folder.path().join(name));
    for clone in &clones {
        copy(&home, clone)?;
    }
    // Where it was, it goes on as if nothing had been.
    world.machine.resume();
    echo(&stream, 1)?;
    hang_up(&stream)?;
    world.expect_progress(0)?;
    world.expect_alive()?;
    drop(world);

    let mut processes = Vec::new();
    for clone in &clones {
        let place = format!("{}:{}:{vcpus}", clone.display(), folder.path().display());
        processes.push(Command::new(env::current_exe()?).env(ELSEWHERE, place).spawn()?);
    }
    for mut process in processes {
        let status = process.wait()?;
        if !status.success() {
            return Err(format!("it did not go on elsewhere: {status}").into());
        }
    }
    Ok(())
}

fn elsewhere(place: &str) -> Result<()> {
    let [home, folder, vcpus] = place.split(':').collect::<Vec<_>>()[..] else {
        return Err(format!("{ELSEWHERE}={place} names no place").into());
    };
    let folder = Path::new(folder);
    let world = World::restore(Path::new(home), vcpus.parse()?, &folder.join("state"), &folder.join("memory"))?;
    go_on(&world, 1)
}

/// A guest that was restored has lost its stream, has heard of it, and has everything else.
fn go_on(world: &World, resets: u32) -> Result<()> {
    world.expect_progress(resets)?;
    let stream = world.open(b'e')?;
    echo(&stream, 2)?;
    hang_up(&stream)?;
    world.use_balloon()?;
    world.expect_progress(resets)?;
    world.expect_alive()
}

/// What was restored can be saved as well, and no clone changes the files that it came from.
fn saved_again() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let home = folder.path().join("home");
    make_home(&home)?;
    let mut world = World::boot(&home, 1)?;
    for generation in 0..3 {
        let [state, memory] = ["state", "memory"].map(|name| folder.path().join(format!("{name}{generation}")));
        world.expect_progress(generation)?;
        let stream = world.open(b'e')?;
        echo(&stream, 0)?;
        world.machine.pause();
        world.save(&state, &memory)?;
        drop(world);
        let before = fs::metadata(&memory)?.modified()?;
        world = World::restore(&home, 1, &state, &memory)?;
        go_on(&world, generation + 1)?;
        if fs::metadata(&memory)?.modified()? != before {
            return Err("a clone wrote into the file that it came from".into());
        }
    }
    Ok(())
}

fn pause(world: &World) -> Result<()> {
    world.machine.pause();
    world.machine.resume();
    Ok(())
}

fn trim(world: &World) -> Result<()> {
    Ok(world.machine.trim()?)
}

/// What was given back of a machine's memory is written down all the same, of a clone's as well.
fn trimmed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let home = folder.path().join("home");
    make_home(&home)?;
    let mut world = World::boot(&home, 1)?;
    for generation in 0..2 {
        let [state, memory] = ["state", "memory"].map(|name| folder.path().join(format!("{name}{generation}")));
        world.expect_progress(generation)?;
        world.expect_progress(generation)?;
        let stream = world.open(b'e')?;
        echo(&stream, 0)?;
        trim(&world)?;
        world.expect_progress(generation)?;
        trim(&world)?;
        world.machine.pause();
        world.save(&state, &memory)?;
        drop(world);
        world = World::restore(&home, 1, &state, &memory)?;
        go_on(&world, generation + 1)?;
    }
    Ok(())
}

/// On a host with another kernel the machine goes on as long as its processors are the same, and not if they are not.
fn compared() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let home = folder.path().join("home");
    make_home(&home)?;
    let [state, memory] = ["state", "memory"].map(|name| folder.path().join(name));
    let world = World::boot(&home, 1)?;
    world.expect_progress(0)?;
    world.machine.pause();
    world.save(&state, &memory)?;
    drop(world);
    let saved = fs::read(&state)?;
    let name = rustix::system::uname();
    let ours = name.release().to_bytes();
    let other: Vec<_> = ours.iter().rev().copied().collect();
    let on_another_kernel = replaced(&saved, ours, &other)?;
    fs::write(&state, &on_another_kernel)?;
    let world = World::restore(&home, 1, &state, &memory)?;
    world.expect_progress(0)?;
    drop(world);
    let model = std::arch::x86_64::__cpuid(1).eax;
    fs::write(&state, replaced(&on_another_kernel, &model.to_le_bytes(), &(model ^ 0x10).to_le_bytes())?)?;
    match World::restore(&home, 1, &state, &memory) {
        Err(error) if error.to_string().contains("its processors differ") => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err("the machine goes on with other processors".into()),
    }
}

/// A state file in which all of `old` is `new`.
fn replaced(saved: &[u8], old: &[u8], new: &[u8]) -> Result<Vec<u8>> {
    const HEADER: usize = 24;
    let (header, body) = saved.split_at(HEADER);
    let mut body = body.to_vec();
    let places = body.windows(old.len()).enumerate().filter(|(_, window)| *window == old);
    let places: Vec<_> = places.map(|(place, _)| place).collect();
    if places.is_empty() || old.len() != new.len() {
        return Err("the state is not as it was thought to be".into());
    }
    for place in places {
        body[place..place + new.len()].copy_from_slice(new);
    }
    Ok([&header[..20], &crc32fast::hash(&body).to_le_bytes(), &body].concat())
}

/// Bytes, files, frames and time go on through whatever is done to a machine any number of times.
fn is_not_noticed(times: u32, disturb: fn(&World) -> Result<()>) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let home = folder.path().join("home");
    make_home(&home)?;
    let world = World::boot(&home, 2)?;
    let stream = world.open(b'e')?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let streaming = scope.spawn(|| -> Result<u8> {
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) {
                echo(&stream, rounds)?;
                rounds = rounds.wrapping_add(1);
            }
            hang_up(&stream)?;
            Ok(rounds)
        });
        let disturbed = (0..times).try_for_each(|time| {
            disturb(&world)?;
            if time % 10 == 0 { world.expect_progress(0) } else { Ok(()) }
        });
        over.store(true, Ordering::Relaxed);
        let rounds = streaming.join().unwrap_or_else(|_| Err("panicked".into()))?;
        if rounds == 0 {
            return Err("nothing was streamed".into());
        }
        disturbed
    })?;
    world.use_balloon()?;
    world.expect_progress(0)?;
    world.expect_alive()
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").args(["--archive", "--sparse=always"]).args([from, to]).status()?;
    if status.success() { Ok(()) } else { Err(format!("{} cannot be copied: {status}", from.display()).into()) }
}
