//! Whether a process's seccomp filters let a system call through: asked of the filters, not by trying (a try may
//! kill the process).
//!
//! A filter is a program of classic BPF over `struct seccomp_data`; a few dozen operations, no loops. The
//! strictest of all filters' answers counts.
//!
//! Invariant: what is not understood counts as forbidden.
//!
//! Not here: reading the filters out of the process (`inject`).

/// One instruction, `struct sock_filter`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u16,
    pub(crate) jump_true: u8,
    pub(crate) jump_false: u8,
    pub(crate) value: u32,
}

/// A system call as a filter sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) number: u32,
    pub(crate) instruction: u64,
    pub(crate) arguments: [u64; 6],
}

const ARCH_X86_64: u32 = 0xc000_003e;
const RET_ALLOW: u32 = 0x7fff_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const ACTION_MASK: u32 = 0xffff_0000;
const MEMORY_WORDS: usize = 16;

/// Whether every filter lets `call` through.
pub(crate) fn allows(filters: &[Vec<Instruction>], call: &Call) -> bool {
    filters.iter().all(|filter| {
        let action = run(filter, call).map(|value| value & ACTION_MASK);
        matches!(action, Some(RET_ALLOW | RET_LOG))
    })
}

fn word_at(call: &Call, offset: u32) -> Option<u32> {
    let low = |value: u64| value as u32;
    let high = |value: u64| (value >> 32) as u32;
    match offset {
        0 => Some(call.number),
        4 => Some(ARCH_X86_64),
        8 => Some(low(call.instruction)),
        12 => Some(high(call.instruction)),
        16..64 if offset.is_multiple_of(4) => {
            let argument = *call.arguments.get(((offset - 16) / 8) as usize)?;
            Some(if offset.is_multiple_of(8) { low(argument) } else { high(argument) })
        }
        _ => None,
    }
}

#[derive(Default)]
struct Machine {
    a: u32,
    x: u32,
    memory: [u32; MEMORY_WORDS],
}

/// The value a filter returns; `None` if it does what the kernel would have refused.
fn run(filter: &[Instruction], call: &Call) -> Option<u32> {
    let mut machine = Machine::default();
    let mut at = 0usize;
    loop {
        let step = filter.get(at)?;
        at += 1;
        match step.code & 0x07 {
            // BPF_RET: a constant, or the accumulator.
            0x06 => return Some(if step.code & 0x18 == 0x10 { machine.a } else { step.value }),
            0x05 => at = at.checked_add(jump(step, &machine)?)?,
            _ => machine.step(step, call)?,
        }
    }
}

fn jump(step: &Instruction, machine: &Machine) -> Option<usize> {
    let operand = if step.code & 0x08 == 0 { step.value } else { machine.x };
    let taken = match step.code & 0xf0 {
        0x00 => return usize::try_from(step.value).ok(),
        0x10 => machine.a == operand,
        0x20 => machine.a > operand,
        0x30 => machine.a >= operand,
        0x40 => machine.a & operand != 0,
        _ => return None,
    };
    Some(usize::from(if taken { step.jump_true } else { step.jump_false }))
}

impl Machine {
    fn step(&mut self, step: &Instruction, call: &Call) -> Option<()> {
        let slot = step.value as usize;
        match step.code {
            0x20 => self.a = word_at(call, step.value)?,
            0x00 => self.a = step.value,
            0x60 => self.a = *self.memory.get(slot)?,
            // BPF_LD | BPF_LEN and its twin: the size of `struct seccomp_data`.
            0x80 => self.a = 64,
            0x81 => self.x = 64,
            0x01 => self.x = step.value,
            0x61 => self.x = *self.memory.get(slot)?,
            0x02 => *self.memory.get_mut(slot)? = self.a,
            0x03 => *self.memory.get_mut(slot)? = self.x,
            0x07 => self.x = self.a,
            0x87 => self.a = self.x,
            code if code & 0x07 == 0x04 => self.a = self.compute(step)?,
            _ => return None,
        }
        Some(())
    }

    fn compute(&self, step: &Instruction) -> Option<u32> {
        let operand = if step.code & 0x08 == 0 { step.value } else { self.x };
        let a = self.a;
        Some(match step.code & 0xf0 {
            0x00 => a.wrapping_add(operand),
            0x10 => a.wrapping_sub(operand),
            0x20 => a.wrapping_mul(operand),
            0x30 => a.checked_div(operand)?,
            0x40 => a | operand,
            0x50 => a & operand,
            0x60 => a.checked_shl(operand)?,
            0x70 => a.checked_shr(operand)?,
            0x80 => a.wrapping_neg(),
            0xa0 => a ^ operand,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn step(code: u16, jump_true: u8, jump_false: u8, value: u32) -> Instruction {
        Instruction { code, jump_true, jump_false, value }
    }

    fn call(number: u32, argument: u64) -> Call {
        Call { number, instruction: 0x1000, arguments: [argument, 0, 0, 0, 0, 0] }
    }

    /// "Kill `number`, if its first argument has bit 33; allow everything else."
    fn filter(number: u32) -> Vec<Instruction> {
        vec![
            step(0x20, 0, 0, 4),
            step(0x15, 1, 0, ARCH_X86_64),
            step(0x06, 0, 0, 0),
            step(0x20, 0, 0, 0),
            step(0x15, 0, 3, number),
            step(0x20, 0, 0, 20),
            step(0x45, 0, 1, 2),
            step(0x06, 0, 0, 0x8000_0000),
            step(0x06, 0, 0, RET_ALLOW),
        ]
    }

    #[test]
    fn the_strictest_filter_counts() {
        let filters = [filter(57), filter(323)];
        assert!(allows(&filters, &call(1, 1 << 33)));
        assert!(allows(&filters, &call(323, 0)));
        assert!(!allows(&filters, &call(323, 1 << 33)));
        assert!(!allows(&filters, &call(57, 1 << 33)));
        assert!(allows(&[], &call(323, 0)));
    }

    #[test]
    fn a_filter_that_makes_no_sense_forbids() {
        assert!(!allows(&[vec![]], &call(1, 0)));
        assert!(!allows(&[vec![step(0x05, 0, 0, u32::MAX)]], &call(1, 0)));
        assert!(!allows(&[vec![step(0x34, 0, 0, 0), step(0x06, 0, 0, RET_ALLOW)]], &call(1, 0)));
        assert!(!allows(&[vec![step(0x20, 0, 0, 3), step(0x06, 0, 0, RET_ALLOW)]], &call(1, 0)));
    }
}
