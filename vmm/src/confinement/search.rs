//! The beginning of a filter, which lets system calls pass by their numbers alone.
//!
//! When Linux takes a filter it runs it for each system call that there is, to know which ones pass with any arguments. A
//! hundred comparisons one after the other, as seccompiler writes them, are 150 µs of that; halving takes 40. A machine has
//! a dozen threads, each of which takes a filter before the guest runs.

use libc::{BPF_ABS, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
use linux_raw_sys::ptrace::{AUDIT_ARCH_X86_64, SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS};
use seccompiler::{BackendError, BpfProgram, sock_filter};

/// Where `struct seccomp_data` has what is looked at, in bytes.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// A program that lets these calls pass, which are in order, ends a process that calls as another architecture's, and goes on
/// behind its end for all other calls.
///
/// # Errors
/// [`BackendError::FilterTooLarge`] for more calls than there are.
pub(super) fn passing(calls: impl Iterator<Item = u32>) -> Result<BpfProgram, BackendError> {
    let mut program = vec![
        load(ARCHITECTURE),
        jump(BPF_JEQ, AUDIT_ARCH_X86_64, 1),
        instruction(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
    ];
    halve(&edges(calls), false, &mut program)?;
    let end = program.len();
    for (place, instruction) in program.iter_mut().enumerate() {
        if is_elsewhere(instruction) {
            instruction.k = (end - place - 1) as u32;
        }
    }
    Ok(program)
}

/// The numbers from which on calls pass, or do not pass any more, in turn.
fn edges(calls: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut edges: Vec<u32> = Vec::new();
    for call in calls {
        match edges.last_mut() {
            Some(end) if *end == call => *end = call + 1,
            _ => edges.extend([call, call + 1]),
        }
    }
    edges
}

/// Decides about numbers that are below the first of the edges `inside` what passes, or outside.
fn halve(edges: &[u32], inside: bool, program: &mut BpfProgram) -> Result<(), BackendError> {
    let middle = edges.len() / 2;
    let (below, rest) = edges.split_at(middle);
    let Some((&edge, above)) = rest.split_first() else {
        let passes = instruction(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        program.push(if inside { passes } else { elsewhere() });
        return Ok(());
    };
    let place = program.len();
    program.push(jump(BPF_JGE, edge, 0));
    halve(below, inside, program)?;
    let distance = program.len() - place - 1;
    program[place].jt = distance.try_into().map_err(|_| BackendError::FilterTooLarge(program.len()))?;
    halve(above, inside != middle.is_multiple_of(2), program)
}

fn load(offset: u32) -> sock_filter {
    instruction(BPF_LD | BPF_W | BPF_ABS, offset)
}

/// On to the next instruction, or over some if the comparison with a number is true.
fn jump(comparison: u32, number: u32, over: u8) -> sock_filter {
    sock_filter { jt: over, ..instruction(BPF_JMP | comparison | BPF_K, number) }
}

/// To the program's end.
fn elsewhere() -> sock_filter {
    instruction(BPF_JMP | BPF_JA, 0)
}

fn is_elsewhere(instruction: &sock_filter) -> bool {
    u32::from(instruction.code) == BPF_JMP | BPF_JA
}

fn instruction(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a program answers; none where it goes on behind its end.
    fn run(program: &[sock_filter], architecture: u32, number: u32) -> Option<u32> {
        let (mut place, mut loaded) = (0, 0);
        while let Some(step) = program.get(place) {
            place += 1;
            let jumps = match u32::from(step.code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    loaded = if step.k == NUMBER { number } else { architecture };
                    0
                }
                code if code == BPF_JMP | BPF_JEQ | BPF_K => {
                    u32::from(if loaded == step.k { step.jt } else { step.jf })
                }
                code if code == BPF_JMP | BPF_JGE | BPF_K => {
                    u32::from(if loaded >= step.k { step.jt } else { step.jf })
                }
                code if code == BPF_JMP | BPF_JA => step.k,
                code if code == BPF_RET | BPF_K => return Some(step.k),
                code => panic!("no instruction of ours: {code:#x}"),
            };
            place += jumps as usize;
        }
        None
    }

    #[test]
    fn those_pass_and_no_others() {
        let sets: [&[u32]; 7] =
            [&[], &[0], &[5], &[0, 1, 2], &[1, 3, 5, 7], &[0, 1, 9, 10, 11, 400, 462], &[2, 3, 4, 6]];
        let every_third: Vec<_> = (0..120).map(|call| call * 3).collect();
        for calls in sets.into_iter().chain([&every_third[..]]) {
            let program = passing(calls.iter().copied()).unwrap();
            for number in (0..500).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
                let expected = calls.contains(&number).then_some(SECCOMP_RET_ALLOW);
                assert_eq!(run(&program, AUDIT_ARCH_X86_64, number), expected, "{number} of {calls:?}");
                assert_eq!(run(&program, !AUDIT_ARCH_X86_64, number), Some(SECCOMP_RET_KILL_PROCESS));
            }
        }
    }

    #[test]
    fn more_than_can_be_jumped_over_are_refused() {
        let calls = (0..300).map(|call| call * 2);
        assert!(matches!(passing(calls), Err(BackendError::FilterTooLarge(_))));
    }
}
