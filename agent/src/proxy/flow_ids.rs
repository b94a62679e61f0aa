//! The uuids of flows: shared by both ends, never by two flows.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use uuid::Uuid;

/// Ended flows whose uuid is still refused. Records merge on the uuid: whoever offers one
/// again would join two flows in one line.
const REMEMBERED: usize = 8192;

/// The uuids in use and those used lately.
#[derive(Debug, Default)]
pub struct FlowIds {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    taken: HashSet<Uuid>,
    ended: VecDeque<Uuid>,
}

/// A flow's uuid, remembered for a while after it is dropped.
#[derive(Debug)]
pub struct FlowId {
    ids: Arc<FlowIds>,
    uuid: Uuid,
}

impl FlowIds {
    /// The offered uuid, or a new one when it is missing, live or recent.
    pub fn admit(self: &Arc<Self>, offered: Option<Uuid>) -> FlowId {
        let mut inner = self.lock();
        let uuid = match offered {
            Some(uuid) if inner.taken.insert(uuid) => uuid,
            _ => {
                let uuid = Uuid::new_v4();
                inner.taken.insert(uuid);
                uuid
            }
        };
        drop(inner);
        FlowId { ids: self.clone(), uuid }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Set and queue are only ever changed together, without a panic in between.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FlowId {
    /// The uuid.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }
}

impl Drop for FlowId {
    fn drop(&mut self) {
        let mut inner = self.ids.lock();
        inner.ended.push_back(self.uuid);
        if inner.ended.len() > REMEMBERED
            && let Some(oldest) = inner.ended.pop_front()
        {
            inner.taken.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_or_recent_uuid_is_not_given_twice() {
        let ids = Arc::new(FlowIds::default());
        let offered = Uuid::new_v4();
        let first = ids.admit(Some(offered));
        assert_eq!(first.uuid(), offered);
        assert_ne!(ids.admit(Some(offered)).uuid(), offered, "live");
        drop(first);
        assert_ne!(ids.admit(Some(offered)).uuid(), offered, "recent");
        for _ in 0..REMEMBERED {
            drop(ids.admit(None));
        }
        assert_eq!(ids.admit(Some(offered)).uuid(), offered, "forgotten after a while");
        assert!(ids.lock().taken.len() <= REMEMBERED + 1);
    }
}
