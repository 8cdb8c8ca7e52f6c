//! A device's registers, while its thread serves it: the guest changes its memory under the device's hands.

use arbitrary::{Result, Unstructured};

use crate::board::{Board, access};

/// Does what the input says.
pub fn run(data: &[u8]) {
    // All errors are the end of the input.
    let _ = play(&mut Unstructured::new(data));
}

fn play(u: &mut Unstructured<'_>) -> Result<()> {
    let mut board = Board::new(u)?;
    if u.ratio(1, 2)? {
        board.start(u)?;
    }
    while !u.is_empty() {
        match u.int_in_range(0..=17)? {
            0..=5 => {
                let (register, value) = access(u)?;
                board.write(register.into(), value);
            }
            6 | 7 => {
                let mut bytes = vec![0; u.int_in_range(0..=9)?];
                board.transport.read(u.int_in_range(0..=0x1010)?, &mut bytes);
            }
            8 | 9 => {
                let length = u.int_in_range(0..=9)?;
                let place = if u.ratio(1, 8)? { u.arbitrary()? } else { u.int_in_range(0..=0x1010)? };
                board.transport.write(place, u.bytes(length.min(u.len()))?);
            }
            10..=13 => board.disturb(u)?,
            14 => board.move_on(u)?,
            15 | 16 => board.write_list(u)?,
            _ => board.start(u)?,
        }
    }
    Ok(())
}
