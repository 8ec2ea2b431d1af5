//! Why a request would go where it would go: the verdicts and scores of routing itself.

use std::{collections::BTreeSet, time::Instant};

use protocol::{
    AdapterId, Failure,
    reply::{ExplainReply, Score, WorkerVerdict},
    request::Explain,
};

use super::{clients::check_adapters, encodes::needed, micros};
use crate::{
    Broker,
    cost::Shape,
    requests::ReplyTo,
    routing::{Ask, ScoreUs, Verdict},
};

impl Broker {
    /// Answers where such a request would go now.
    pub(super) fn explain(
        &mut self,
        from: &ReplyTo,
        request: &Explain,
        now: Instant,
    ) -> Result<(), Failure> {
        check_adapters(&request.adapters)?;
        let adapters: BTreeSet<AdapterId> = request.adapters.iter().copied().collect();
        let adapters = needed(&self.blobs, &adapters);
        let shape = Shape {
            model: request.model.clone(),
            chunks: request.chunks,
            stack: !adapters.is_empty(),
        };
        let ask = Ask {
            shape: &shape,
            digest: request.model_digest,
            adapters: &adapters,
            died_on: &[],
            number: self.tasks.next_number(),
        };
        self.pledge_parked(&shape);
        let now_us = micros(now.saturating_duration_since(self.started));
        let verdicts = self.routes.explain(&ask, &self.costs, now_us);
        let decision = self.routes.decide(&ask, &self.costs, now_us);
        self.routes.clear_pledges();
        let chosen = decision.and_then(|decision| self.workers.get(decision.peer));
        let reply = ExplainReply {
            id: from.id.clone(),
            workers: verdicts.into_iter().map(on_the_wire).collect(),
            chosen: chosen.map(|worker| worker.name.clone()),
        };
        self.reply(from, &reply);
        Ok(())
    }

    /// What waits for certain workers stands in front of a request that comes now.
    fn pledge_parked(&mut self, shape: &Shape) {
        let mut place = self.queue.next(&shape.model, None);
        while let Some((_, key)) = place {
            if let Some(parked) = self.tasks.get(key).and_then(|task| task.parked) {
                self.routes.pledge(parked.peer, parked.work_us);
            }
            place = self.queue.next(&shape.model, place);
        }
    }
}

fn on_the_wire(verdict: Verdict) -> WorkerVerdict {
    let Verdict { worker, free, score, .. } = verdict;
    let (refused, score) = match score {
        Ok(score) => (None, Some(score)),
        Err(refused) => (Some(refused), None),
    };
    let score = score.map(|us: ScoreUs| Score {
        queue_ms: ms(us.queue),
        load_ms: ms(us.load),
        model_ms: ms(us.model),
        compute_ms: ms(us.compute),
        total_ms: ms(us.total()),
    });
    WorkerVerdict { worker, refused, score, free }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}
