//! Inputs worth mutating: seeds, and what reached something new.

use std::path::PathBuf;

use crate::rng::{self, Rng};

/// No more are kept.
const INPUTS_MAX: usize = 20_000;

pub struct Corpus {
    inputs: Vec<Vec<u8>>,
    dir: Option<PathBuf>,
}

impl Corpus {
    /// The seeds, an empty input, and what an earlier run left in `dir`.
    pub fn new(mut seeds: Vec<Vec<u8>>, dir: Option<PathBuf>) -> Self {
        seeds.push(Vec::new());
        if let Some(dir) = &dir {
            std::fs::create_dir_all(dir).unwrap_or_else(|error| panic!("make {}: {error}", dir.display()));
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
            files.sort();
            seeds.extend(files.iter().filter_map(|path| std::fs::read(path).ok()).take(INPUTS_MAX));
        }
        Self { inputs: seeds, dir }
    }

    pub fn inputs(&self) -> Vec<Vec<u8>> {
        self.inputs.clone()
    }

    pub fn len(&self) -> usize {
        self.inputs.len()
    }

    /// Newer ones more often: they are where the frontier is.
    pub fn pick(&self, rng: &mut Rng) -> &[u8] {
        let len = self.inputs.len();
        let at = if rng.chance(2) { len - 1 - rng.below(len.div_ceil(4)) } else { rng.below(len) };
        self.inputs.get(at).map_or(&[], Vec::as_slice)
    }

    pub fn add(&mut self, input: Vec<u8>) {
        if self.inputs.len() >= INPUTS_MAX {
            return;
        }
        if let Some(dir) = &self.dir {
            // A corpus on disk saves time the next time; without it nothing is wrong.
            let _ = std::fs::write(dir.join(format!("{:016x}", rng::hash(&input))), &input);
        }
        self.inputs.push(input);
    }
}
