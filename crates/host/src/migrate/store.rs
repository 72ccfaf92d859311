//! The handover's reads and transactions, against the metadata store.
//!
//! Invariant: a transaction whose outcome is not known is reported as unknown, never as not made; the machine reads
//! back. The host never repeats one by itself.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;
use whimbrel_engine::migrate::handover::{Cas, CasResult, Seen};
use whimbrel_wire::Name;
use whimbrel_wire::meta::{VmRecord, VolumeRecord, key};

use crate::error::{Error, ErrorKind, Result};
use crate::meta::{Committed, Compare, MetaStore, Op};
use crate::records;

/// The records of the volumes of one move.
///
/// Those that were read before COMMIT are remembered: after it the guest must not wait for the store once more.
pub struct VolumeRecords {
    meta: Arc<dyn MetaStore>,
    last: Mutex<HashMap<Name, VolumeRecord>>,
}

impl VolumeRecords {
    /// None read yet.
    pub fn new(meta: &Arc<dyn MetaStore>) -> Self {
        Self { meta: Arc::clone(meta), last: Mutex::default() }
    }

    /// The record as the store has it now.
    pub async fn read(&self, name: &Name) -> Result<VolumeRecord> {
        let what = format!("volume {name}");
        let record = records::must::<VolumeRecord>(&*self.meta, &key::volume(name), &what).await?.value;
        self.last.lock().insert(name.clone(), record.clone());
        Ok(record)
    }

    /// The record as it was last read; read now if it never was.
    pub async fn known(&self, name: &Name) -> Result<VolumeRecord> {
        let known = self.last.lock().get(name).cloned();
        match known {
            Some(record) => Ok(record),
            None => self.read(name).await,
        }
    }
}

/// The VM's record and its volumes'.
pub async fn read(meta: &dyn MetaStore, vm: &Name) -> Result<Seen> {
    let Some(record) = records::get::<VmRecord>(meta, &key::vm(vm)).await? else {
        return Ok(Seen::default());
    };
    let mut volumes = Vec::with_capacity(record.value.spec.volumes.len());
    for name in &record.value.spec.volumes {
        // One that is gone was deleted on purpose; whoever needs it counts.
        if let Some(volume) = records::get::<VolumeRecord>(meta, &key::volume(name)).await? {
            volumes.push((volume.value, volume.mod_rev));
        }
    }
    Ok(Seen { vm: Some((record.value, record.mod_rev)), volumes })
}

/// Makes the change if no record has changed since it was read.
pub async fn cas(meta: &dyn MetaStore, cas: &Cas) -> CasResult {
    let (compare, ops) = match encode(cas) {
        Ok(parts) => parts,
        Err(error) => return CasResult::NotMade(error.to_wire()),
    };
    match meta.txn(compare, ops).await {
        Ok(Committed::Yes(rev)) => CasResult::Yes(rev),
        Ok(Committed::Conflict) => CasResult::Conflict,
        Err(error) if error.kind() == ErrorKind::Unknown => CasResult::Unknown(error.to_wire()),
        // The store's contract: any other error says that nothing was made.
        Err(error) => CasResult::NotMade(error.to_wire()),
    }
}

fn encode(cas: &Cas) -> Result<(Vec<Compare>, Vec<Op>)> {
    let mut compare = Vec::with_capacity(1 + cas.volumes.len());
    let mut ops = Vec::with_capacity(1 + cas.volumes.len());
    let (vm, rev) = &cas.vm;
    push(&mut compare, &mut ops, key::vm(&vm.name), *rev, vm)?;
    for (volume, rev) in &cas.volumes {
        push(&mut compare, &mut ops, key::volume(&volume.name), *rev, volume)?;
    }
    Ok((compare, ops))
}

fn push<T: Serialize>(
    compare: &mut Vec<Compare>,
    ops: &mut Vec<Op>,
    key: String,
    rev: u64,
    value: &T,
) -> Result<()> {
    let bytes = serde_json::to_vec(value)
        .map_err(|error| Error::with_source(ErrorKind::Internal, format!("write record {key}"), error))?;
    compare.push(Compare::Unchanged(key.clone(), rev));
    ops.push(Op::Put(key, bytes));
    Ok(())
}
