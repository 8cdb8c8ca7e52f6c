//! The agent's memory, there before it is touched.
//!
//! A page that a process comes to for the first time takes a PVM guest three exits, 20 to 60 µs; where the kernel has been
//! asked for many at once the last of the three is left, for several pages together. A process of the agent's comes to all
//! of its pages for the first time, being restored from a template or a copy of another. What a copy may write to is there,
//! as the guest's kernel copies it at once (`FORK_COPY_PAGES`, docs/kernel.md); its code is not.

use std::fs;
use std::ops::Range;
use std::ptr;
use std::sync::OnceLock;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

/// How much of the heap is asked for, from its beginning: more than making a container takes.
const HEAP: usize = 1 << 20;
/// By how much more than needed the heap grows, in bytes.
const HEAP_STEP: libc::c_int = 128 << 10;
/// How many such steps of room the heap has for making a container, which takes two.
const HEAP_ROOM: usize = 3;
/// The program's file, by its name in the guest.
const PROGRAM: &str = "/init";
/// How much stack the agent uses at most, in bytes.
const STACK: usize = 96 << 10;
/// What KVM's shadow of a page table gets at once, in bytes of the memory that is mapped: eight entries.
const GROUP: usize = 32 << 10;

static LAYOUT: OnceLock<Layout> = OnceLock::new();

/// Where the agent's memory is, as addresses.
#[derive(Debug, Default, PartialEq, Eq)]
struct Layout {
    /// Code and constants, of the program's file.
    constant: Vec<Range<usize>>,
    /// Variables, the used part of the stack included.
    variable: Vec<Range<usize>>,
    /// Where the heap begins.
    heap: Option<usize>,
}

/// Has the memory of this process, PID 1, be there, and that of its copies from now on. `/proc` must be mounted.
pub(crate) fn settle() {
    // Libraries ask the processor once for each process what it can do, which is an exit for each question.
    std::hint::black_box(std::arch::is_x86_feature_detected!("avx2"));
    grow_heap();
    let stack = grow_stack();
    let map = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let layout = LAYOUT.get_or_init(|| Layout::of(&map, stack));
    let starts = layout.constant.iter().chain(&layout.variable).map(|range| range.start).chain(layout.heap);
    starts.for_each(complete_group);
    settle_copy();
    layout.variable.iter().for_each(|range| populate(range, Advice::LinuxPopulateWrite));
    if let Some(start) = layout.heap {
        // SAFETY: it changes nothing.
        let end = unsafe { libc::sbrk(0) }.addr();
        populate(&(start..end.min(start + HEAP)), Advice::LinuxPopulateWrite);
    }
}

/// The same in a copy of this process, whose code is mapped nowhere yet.
pub(crate) fn settle_copy() {
    if let Some(layout) = LAYOUT.get() {
        layout.constant.iter().for_each(|range| populate(range, Advice::LinuxPopulateRead));
    }
}

/// Has the pages before a mapping be there, as far as its first group begins with them: beside the page that was touched the
/// shadow gets no more of a group than what is before the first that is missing.
fn complete_group(start: usize) {
    let begin = start & !(GROUP - 1);
    let gap = begin..start;
    let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE);
    // SAFETY: nothing is where this is mapped, and nobody has its address.
    let mapped = unsafe { mmap_anonymous(ptr::with_exposed_provenance_mut(begin), gap.len(), rights, flags) };
    // Something else is there, or there is no gap.
    if mapped.is_ok() {
        populate(&gap, Advice::LinuxPopulateWrite);
    }
}

/// What is not there is come to later: memory is short, or the kernel is older than the request.
fn populate(range: &Range<usize>, how: Advice) {
    let start = ptr::with_exposed_provenance_mut(range.start);
    // SAFETY: populating changes no byte, whatever is mapped there.
    let _ = unsafe { madvise(start, range.len(), how) };
}

/// Has the heap begin with room, and keep what it once had.
fn grow_heap() {
    // SAFETY: it changes numbers that are looked at when the heap is short of room, or has too much.
    unsafe { libc::mallopt(libc::M_TOP_PAD, HEAP_STEP) };
    // SAFETY: as above.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, HEAP as libc::c_int) };
    // Each is less than what is mapped for itself: the heap is short of room, and grows.
    let room = [(); HEAP_ROOM].map(|()| Vec::<u8>::with_capacity(HEAP_STEP as usize - 4096));
    drop(std::hint::black_box(room));
}

/// Has the stack be as large as it will be; that part of it.
fn grow_stack() -> Range<usize> {
    let here = 0_u8;
    let top = (&raw const here).expose_provenance();
    let bottom = top - STACK;
    // SAFETY: the stack may grow by megabytes, and there is nothing of it below its last function yet.
    unsafe { ptr::with_exposed_provenance_mut::<u8>(bottom).write_volatile(0) };
    bottom..top
}

impl Layout {
    /// From the text of `/proc/PID/maps` (proc_pid_maps(5)) of a process that uses this part of its stack.
    fn of(map: &str, stack: Range<usize>) -> Self {
        let mut layout = Self::default();
        for line in map.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
            let Some(range) = parse(range) else { continue };
            let name = words.nth(3).unwrap_or_default();
            match (name, rights.as_bytes()) {
                ("[heap]", _) => layout.heap = Some(range.start),
                ("[stack]", _) => layout.variable.push(range.start.max(page_of(stack.start))..range.end),
                (PROGRAM | "", b"rw-p") => layout.variable.push(range),
                (PROGRAM, b"r--p" | b"r-xp") => layout.constant.push(range),
                _ => {}
            }
        }
        layout
    }
}

fn page_of(address: usize) -> usize {
    address & !(rustix::param::page_size() - 1)
}

fn parse(range: &str) -> Option<Range<usize>> {
    let (start, end) = range.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    Some(address(start)?..address(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_completed_where_nothing_is_and_nowhere_else() {
        let page = rustix::param::page_size();
        let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: it is mapped where nothing is.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), 2 * GROUP, rights, flags) }.unwrap().expose_provenance();
        let group = base.next_multiple_of(GROUP);
        let at = |page_of_group: usize| ptr::with_exposed_provenance_mut::<u8>(group + page_of_group * page);
        // SAFETY: these pages are this test's.
        unsafe { at(4).write(1) };
        complete_group(group + 5 * page);
        // SAFETY: as above.
        assert_eq!(unsafe { at(4).read() }, 1);
        // SAFETY: nobody uses them.
        unsafe { rustix::mm::munmap(at(0).cast(), 3 * page) }.unwrap();
        complete_group(group + 3 * page);
        for page_of_group in 0..3 {
            // SAFETY: it looks whether something is mapped there.
            unsafe { madvise(at(page_of_group).cast(), page, Advice::Normal) }.unwrap();
        }
    }

    #[test]
    fn code_variables_heap_and_stack_are_found() {
        let map = "\
            5000-6000 r--p 00000000 00:02 7    /init\n\
            6000-8000 r-xp 00001000 00:02 7    /init\n\
            8000-9000 rw-p 00003000 00:02 7    /init\n\
            9000-a000 rw-p 00000000 00:00 0\n\
            b000-f000 rw-p 00000000 00:00 0    [heap]\n\
            20000-30000 rw-p 00000000 00:00 0    [stack]\n\
            31000-32000 r--p 00000000 00:00 0    [vvar]\n\
            32000-33000 r-xp 00000000 00:00 0    [vdso]\n";
        let layout = Layout {
            constant: vec![0x5000..0x6000, 0x6000..0x8000],
            variable: vec![0x8000..0x9000, 0x9000..0xa000, 0x2e000..0x30000],
            heap: Some(0xb000),
        };
        assert_eq!(Layout::of(map, 0x2e123..0x2f000), layout);
    }
}
