//! Which devices a container may use: a BPF program at its cgroup, as the second version of cgroups has it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;

use libcontainer::oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// bpf(2): commands, types and flags that this module uses.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

const BLOCK: i32 = 1;
const CHAR: i32 = 2;

const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// The registers: the answer, the context (free once it is read), and what is asked.
const ANSWER: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// One instruction, as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A rule: of several that are about an access, the last decides.
#[derive(Clone, Copy, Debug)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// What runc grants to every container, after its own rules: making any node, and using the harmless.
const GRANTED: [Rule; 11] = [
    grant(CHAR, None, None, MKNOD),
    grant(BLOCK, None, None, MKNOD),
    grant(CHAR, Some(1), Some(3), ALL),
    grant(CHAR, Some(1), Some(5), ALL),
    grant(CHAR, Some(1), Some(7), ALL),
    grant(CHAR, Some(1), Some(8), ALL),
    grant(CHAR, Some(1), Some(9), ALL),
    grant(CHAR, Some(5), Some(0), ALL),
    grant(CHAR, Some(5), Some(2), ALL),
    grant(CHAR, Some(10), Some(200), ALL),
    grant(CHAR, Some(136), None, ALL),
];

const fn grant(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// Puts the rules at the cgroup. What none of them allows is forbidden.
pub(super) fn restrict(cgroup: &Path, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
    let rules: Vec<_> = rules.iter().map(Rule::from).chain(GRANTED).collect();
    let program = load(&compile(&rules))?;
    attach(&program, &File::open(cgroup)?)
}

/// Allows everything at the cgroup. The kernel has a region for such programs, which it fills when it loads the
/// first one, and frees with the last: with this one there a container waits for neither.
pub(crate) fn allow_all(cgroup: &Path) -> io::Result<()> {
    let everything = Rule { allow: true, kind: None, major: None, minor: None, access: ALL };
    attach(&load(&compile(&[everything]))?, &File::open(cgroup)?)
}

impl From<&LinuxDeviceCgroup> for Rule {
    fn from(rule: &LinuxDeviceCgroup) -> Self {
        let kind = match rule.typ() {
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
            // A pipe is no device.
            Some(LinuxDeviceType::P) => Some(0),
            Some(LinuxDeviceType::A) | None => None,
        };
        // A negative number stands for any, and one that no device has matches none.
        let number = |number: Option<i64>| number.filter(|&number| number >= 0).map(|n| i32::try_from(n).unwrap_or(-1));
        let letters = rule.access().as_deref().unwrap_or("rwm");
        let access = [('m', MKNOD), ('r', READ), ('w', WRITE)];
        let access = access.iter().filter(|(letter, _)| letters.contains(*letter)).map(|(_, bit)| bit).sum();
        Self { allow: rule.allow(), kind, major: number(rule.major()), minor: number(rule.minor()), access }
    }
}

/// Makes a program that looks at the rules from the last to the first.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        load_word(KIND, 0),
        copy(ACCESS, KIND),
        immediate(0x77, ACCESS, 16),
        immediate(0x57, KIND, 0xffff),
        load_word(MAJOR, 4),
        load_word(MINOR, 8),
    ];
    for rule in rules.iter().rev() {
        let tests: Vec<_> = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)]
            .into_iter()
            .filter_map(|(register, wanted)| Some((register, wanted?)))
            .collect();
        let about_access = rule.access != ALL;
        let access_length = if about_access { 3 } else { 0 };
        let length = tests.len() + access_length + ANSWER_LENGTH;
        let start = program.len();
        // A jump's offset counts from the instruction behind it.
        let to_next = |program: &Vec<_>| i16::try_from(start + length - program.len() - 1).unwrap_or(i16::MAX);
        for (register, wanted) in &tests {
            program.push(jump(JUMP_IF_NOT_EQUAL, *register, *wanted, to_next(&program)));
        }
        if about_access {
            // To be allowed, all that is asked must be named; to be forbidden, any of it.
            let (mask, test) =
                if rule.allow { (ALL & !rule.access, JUMP_IF_NOT_EQUAL) } else { (rule.access, JUMP_IF_EQUAL) };
            program.push(copy(CONTEXT, ACCESS));
            program.push(immediate(0x57, CONTEXT, mask));
            program.push(jump(test, CONTEXT, 0, to_next(&program)));
        }
        program.extend(answer(rule.allow));
        if tests.is_empty() && !about_access {
            // The kernel takes no program with a part that is never reached.
            return program;
        }
    }
    program.extend(answer(false));
    program
}

const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
const ANSWER_LENGTH: usize = 2;

fn load_word(register: u8, offset: i16) -> Instruction {
    Instruction { code: 0x61, registers: register | CONTEXT << 4, offset, immediate: 0 }
}

fn copy(to: u8, from: u8) -> Instruction {
    Instruction { code: 0xbf, registers: to | from << 4, offset: 0, immediate: 0 }
}

fn immediate(code: u8, register: u8, immediate: i32) -> Instruction {
    Instruction { code, registers: register, offset: 0, immediate }
}

fn jump(code: u8, register: u8, immediate: i32, offset: i16) -> Instruction {
    Instruction { code, registers: register, offset, immediate }
}

fn answer(allow: bool) -> [Instruction; ANSWER_LENGTH] {
    [immediate(0xb7, ANSWER, i32::from(allow)), immediate(0x95, 0, 0)]
}

/// The head of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
    };
    // SAFETY: the structure has its kernel layout, and what it points to outlives the call.
    let loaded = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    let file = RawFd::try_from(loaded).ok().filter(|&file| file >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made the file for this.
    Ok(unsafe { OwnedFd::from_raw_fd(file) })
}

/// The head of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target: RawFd,
    program: RawFd,
    kind: u32,
    flags: u32,
}

fn attach(program: &OwnedFd, cgroup: &File) -> io::Result<()> {
    let (target, program) = (cgroup.as_raw_fd(), program.as_raw_fd());
    let attach = Attach { target, program, kind: BPF_CGROUP_DEVICE, flags: BPF_F_ALLOW_MULTI };
    // SAFETY: the structure has its kernel layout.
    let attached = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<Attach>()) };
    if attached < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What the program answers, by the rules of the machine that it is for.
    fn run(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_i64; 11];
        let mut next = 0;
        for _ in 0..10_000 {
            let Instruction { code, registers: pair, offset, immediate } = program[next];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            next += 1;
            let skip = usize::try_from(offset).unwrap();
            match code {
                0x61 => registers[to] = i64::from(context[skip / 4]),
                0xbf => registers[to] = registers[from],
                0x77 => registers[to] >>= immediate,
                0x57 => registers[to] &= i64::from(immediate),
                0xb7 => registers[to] = i64::from(immediate),
                JUMP_IF_EQUAL if registers[to] == i64::from(immediate) => next += skip,
                JUMP_IF_NOT_EQUAL if registers[to] != i64::from(immediate) => next += skip,
                JUMP_IF_EQUAL | JUMP_IF_NOT_EQUAL => {}
                0x95 => return registers[0] != 0,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
        panic!("the program does not end");
    }

    fn program(rules: serde_json::Value) -> Vec<Instruction> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(rules).unwrap();
        compile(&rules.iter().map(Rule::from).chain(GRANTED).collect::<Vec<_>>())
    }

    #[test]
    fn what_is_not_allowed_is_forbidden() {
        let program = program(json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "minor": 0, "access": "r"},
            {"allow": true, "type": "c", "major": 10, "access": "rw"},
            {"allow": false, "type": "c", "major": 10, "minor": 229, "access": "w"},
        ]));
        assert!(run(&program, CHAR, READ | WRITE, 1, 3), "/dev/null is granted");
        assert!(run(&program, BLOCK, MKNOD, 99, 99), "making nodes is granted");
        assert!(!run(&program, CHAR, READ, 1, 11), "/dev/kmsg is not");
        assert!(run(&program, BLOCK, READ, 8, 0));
        assert!(!run(&program, BLOCK, READ | WRITE, 8, 0));
        assert!(!run(&program, BLOCK, READ, 8, 1));
        assert!(!run(&program, CHAR, READ, 8, 0));
        assert!(run(&program, CHAR, READ | WRITE, 10, 1));
        assert!(!run(&program, CHAR, READ | WRITE, 10, 229));
        assert!(run(&program, CHAR, READ, 10, 229));
    }

    #[test]
    fn a_privileged_container_may_use_all_and_ends_the_program() {
        let program = program(json!([{"allow": false, "access": "r"}, {"allow": true, "access": "rwm"}]));
        assert!(run(&program, CHAR, READ | WRITE, 1, 11));
        assert!(run(&program, BLOCK, ALL, 254, 0));
        let last = program.len() - ANSWER_LENGTH;
        assert_eq!(program[last..], answer(true), "nothing follows what is always reached");
    }

    #[test]
    fn without_rules_there_is_what_every_container_has() {
        let program = program(json!([]));
        assert!(run(&program, CHAR, READ, 5, 0));
        assert!(!run(&program, BLOCK, READ, 8, 0));
    }
}
