//! What a guest's processor offers, as CPUID shows it: the same at both ends of a move, or there is no move.
//!
//! A name is not enough: `host` and `max` are what the machine and QEMU's version make of them, and KVM leaves out of
//! any model what the hardware lacks. A guest that has seen a feature goes on to use it.
//!
//! Invariant: nothing is guessed; a QEMU that does not tell is compared with nothing.
//!
//! Not here: whether the other host's QEMU knows the model at all (`migrate::target`).

use serde::Deserialize;
use serde_json::json;
use whimbrel_wire::peer::migrate::CpuidWord;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::qmp::Qmp;

/// QEMU's own form (`X86CPUFeatureWordInfo` of its QAPI schema).
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FeatureWord {
    cpuid_input_eax: u32,
    cpuid_input_ecx: Option<u32>,
    cpuid_register: String,
    features: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cpu {
    qom_path: String,
}

/// The feature words of the guest's first processor; all of a VM's are alike.
pub async fn features(qmp: &Qmp) -> Result<Vec<CpuidWord>> {
    let cpus: Vec<Cpu> = qmp.execute("query-cpus-fast", json!({})).await?;
    let Some(cpu) = cpus.first() else { return Ok(Vec::new()) };
    let property = json!({ "path": cpu.qom_path, "property": "feature-words" });
    let words: Vec<FeatureWord> = qmp.execute("qom-get", property).await?;
    let word = |word: FeatureWord| CpuidWord {
        leaf: word.cpuid_input_eax,
        subleaf: word.cpuid_input_ecx,
        register: word.cpuid_register,
        bits: word.features,
    };
    Ok(words.into_iter().map(word).collect())
}

/// Refuses a target whose processor is not the source's. Words that only one of them knows of count if they are not
/// empty: QEMU's versions tell of more and more leaves.
pub fn must_be_equal(source: &[CpuidWord], target: &[CpuidWord]) -> Result<()> {
    if source.is_empty() || target.is_empty() {
        return Ok(());
    }
    let bits = |words: &[CpuidWord], like: &CpuidWord| {
        words.iter().find(|word| word.is_same_place(like)).map_or(0, |word| word.bits)
    };
    let only_target = target.iter().filter(|word| !source.iter().any(|other| other.is_same_place(word)));
    let differences: Vec<String> = source
        .iter()
        .chain(only_target)
        .filter_map(|word| {
            let (here, there) = (bits(source, word), bits(target, word));
            let list = |bits: u32| {
                (0..32)
                    .filter(|bit| bits >> bit & 1 == 1)
                    .map(|bit| bit.to_string())
                    .collect::<Vec<_>>()
                    .join(" ")
            };
            let lacks = (here & !there != 0).then(|| format!("lacks bits {}", list(here & !there)));
            let adds = (there & !here != 0).then(|| format!("adds bits {}", list(there & !here)));
            let what: Vec<String> = lacks.into_iter().chain(adds).collect();
            (!what.is_empty()).then(|| format!("{word}: {}", what.join(", ")))
        })
        .collect();
    if differences.is_empty() {
        return Ok(());
    }
    let words = format!("the guest's processor would not be the same there: {}", differences.join("; "));
    Err(Error::new(ErrorKind::Unsupported, words)
        .hint("start the VM with a processor model that both hosts have in full, such as `--cpu x86-64-v2`"))
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    fn word(leaf: u32, register: &str, bits: u32) -> CpuidWord {
        CpuidWord { leaf, subleaf: None, register: register.into(), bits }
    }

    #[test]
    fn a_difference_is_named_with_its_leaf_register_and_bits() {
        let source = [word(1, "ECX", 0b1010), word(7, "EBX", 1)];
        let target = [word(1, "ECX", 0b0110), word(7, "EBX", 1), word(0x1f, "EAX", 0)];
        let error = must_be_equal(&source, &target).unwrap_err().to_string();
        assert!(error.contains("CPUID 0x1 ECX: lacks bits 3, adds bits 2"), "{error}");
        assert!(!error.contains("0x7") && !error.contains("0x1f"), "{error}");
        let more = [target.to_vec(), vec![word(0x8000_0001, "EDX", 4)]].concat();
        let error = must_be_equal(&target, &more).unwrap_err().to_string();
        assert!(error.contains("0x80000001 EDX: adds bits 2"), "{error}");
    }

    proptest! {
        #[test]
        fn equal_if_and_only_if_every_bit_is(
            words in prop::collection::vec((0u32..4, 0usize..2, any::<u32>()), 1..6), flip in 0usize..64, at in 0usize..6,
        ) {
            let mut source: Vec<CpuidWord> = Vec::new();
            for (leaf, register, bits) in words {
                let new = word(leaf, ["EAX", "EDX"][register], bits);
                if !source.iter().any(|old| old.is_same_place(&new)) {
                    source.push(new);
                }
            }
            let mut target = source.clone();
            target.reverse();
            prop_assert!(must_be_equal(&source, &target).is_ok());
            let index = at % target.len();
            target[index].bits ^= 1 << (flip % 32);
            prop_assert!(must_be_equal(&source, &target).is_err());
            prop_assert!(must_be_equal(&target, &source).is_err());
        }
    }
}
