//! Whatever becomes of a job, the model is afterwards what it was, and no other job sees anything.

use std::{
    cell::Cell,
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
};

use protocol::{Dtype, ErrorCode, ExecutionMode, Family, Fidelity};

use super::{CheckedJob, EncodeJob, job, keeping, with_stack};
use crate::{
    conditioning::Conditioning,
    execution::{
        EncodeError, functional, locking,
        merged_cache::MergedCache,
        modes::{ModeSettings, Modes},
        stage::{Tally, Watch},
    },
    model::LoadedModel,
    testing::{entry, hash_of_weights, model},
};

const FAMILY: Family = Family::Sdxl;

/// How one run in the middle of things ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ending {
    Error,
    Panic,
}

#[test]
fn attached_weights_are_gone_after_success_and_gave_what_virtual_ones_give() {
    let model = model(FAMILY, Dtype::Float16);
    let before = hash_of_weights(&model);
    let job = job(FAMILY);
    let checked = CheckedJob::check(&model, &job, Fidelity::Comfyui).unwrap();
    let attached = locking::encode(&checked, &|| Ok(()), &Tally::default()).unwrap();
    assert_eq!(hash_of_weights(&model), before);

    let cache = MergedCache::new(0);
    let functional = functional::encode(&checked, &cache, &|| Ok(()), &Tally::default()).unwrap();
    assert_eq!(attached.conditionings, functional.conditionings);
    assert_eq!(attached.hook_stacks, functional.hook_stacks);
    assert_eq!(hash_of_weights(&model), before);
}

#[test]
fn an_error_or_a_panic_at_any_moment_leaves_the_model_as_it_was() {
    let model = model(FAMILY, Dtype::Float16);
    let before = hash_of_weights(&model);
    let job = job(FAMILY);
    let checked = CheckedJob::check(&model, &job, Fidelity::Comfyui).unwrap();
    let count = Cell::new(0);
    let counting = || {
        count.set(count.get() + 1);
        Ok(())
    };
    let whole = locking::encode(&checked, &counting, &Tally::default()).unwrap();
    let attached = checked.stack.patches.values().map(BTreeMap::len).sum::<usize>();
    assert!(count.get() > 2 * attached, "the watch looks at every use of a weight");

    // While weights are attached one by one, and now and then in the passes afterwards.
    for ending in [Ending::Error, Ending::Panic] {
        for at in (0..attached + 3).step_by(5).chain((attached + 3..count.get()).step_by(37)) {
            assert!(!ends(&checked, ending, at), "{ending:?} at {at} did not end it");
            assert_eq!(hash_of_weights(&model), before, "{ending:?} at {at}");
        }
    }
    let again = locking::encode(&checked, &|| Ok(()), &Tally::default()).unwrap();
    assert_eq!(again.conditionings, whole.conditionings);
}

#[test]
fn an_interrupted_job_ends_at_the_next_weight_with_cancelled() {
    let model = model(FAMILY, Dtype::Float16);
    let before = hash_of_weights(&model);
    for mode in [ExecutionMode::Locking, ExecutionMode::Functional] {
        let mut job = job(FAMILY);
        job.options.mode = Some(mode);
        let execution = Modes::new(ModeSettings::default());
        let error = thread::scope(|scope| {
            // Nobody attaches anything while somebody reads, so the job is under way or waits.
            let reading = (mode == ExecutionMode::Locking).then(|| model.read());
            if reading.is_none() {
                job.interrupt.set();
            }
            let under_way = scope.spawn(|| execution.encode(&model, &job));
            job.interrupt.set();
            drop(reading);
            under_way.join().unwrap().unwrap_err()
        });
        assert!(matches!(error, EncodeError::Interrupted), "{error}");
        assert_eq!(error.code(), ErrorCode::Cancelled);
        assert_eq!(hash_of_weights(&model), before);
    }
}

#[test]
fn an_interrupt_in_the_middle_of_attaching_leaves_the_model_as_it_was() {
    let model = model(FAMILY, Dtype::Float16);
    let before = hash_of_weights(&model);
    let job = job(FAMILY);
    let checked = CheckedJob::check(&model, &job, Fidelity::Comfyui).unwrap();
    let count = Cell::new(0);
    let interrupted = || {
        count.set(count.get() + 1);
        if count.get() == 20 {
            job.interrupt.set();
        }
        if job.interrupt.is_set() {
            candle_core::bail!("interrupted");
        }
        Ok(())
    };
    locking::encode(&checked, &interrupted, &Tally::default()).unwrap_err();
    assert_eq!((count.get(), hash_of_weights(&model)), (20, before));
}

#[test]
fn threads_that_mix_modes_on_one_model_give_what_each_job_gives_alone() {
    let model = model(FAMILY, Dtype::Float16);
    let before = hash_of_weights(&model);
    let execution = Modes::new(keeping());
    let jobs = mixed_jobs();
    let alone: Vec<Vec<Conditioning>> =
        jobs.iter().map(|job| encoded(&Modes::new(ModeSettings::default()), &model, job)).collect();
    thread::scope(|scope| {
        for lane in 0..4 {
            let (execution, model, jobs, alone) = (&execution, &model, &jobs, &alone);
            scope.spawn(move || {
                for round in 0..6 * jobs.len() {
                    // Steps that share no factor with the number of jobs: another order per lane.
                    let at = (round * [1, 3, 7, 9][lane] + lane) % jobs.len();
                    assert_eq!(encoded(execution, model, &jobs[at]), alone[at], "job {at}");
                }
            });
        }
    });
    assert_eq!(hash_of_weights(&model), before);
    let statistics = execution.merged_statistics();
    assert!(statistics.cached > 0 && statistics.bytes <= keeping().merged_budget_bytes);
}

#[test]
fn a_panic_in_one_thread_does_not_poison_the_model_for_others() {
    let model = model(FAMILY, Dtype::Float32);
    let job = job(FAMILY);
    let execution = Modes::new(ModeSettings::default());
    let expected = encoded(&execution, &model, &job);
    let result = catch_unwind(AssertUnwindSafe(|| {
        let _attached = model.attach();
        panic!("while attached");
    }));
    assert!(result.is_err());
    assert_eq!(encoded(&execution, &model, &job), expected);
}

/// Base, stacks, hooks and fidelities in both modes, ten jobs.
fn mixed_jobs() -> Vec<EncodeJob> {
    let kinds = [
        (with_stack(FAMILY, vec![]), Fidelity::Comfyui),
        (job(FAMILY), Fidelity::Comfyui),
        (with_stack(FAMILY, vec![entry(FAMILY, "kohya", 0.3)]), Fidelity::Comfyui),
        (with_stack(FAMILY, vec![entry(FAMILY, "kohya", -1.0)]), Fidelity::Exact),
        (with_stack(FAMILY, vec![entry(FAMILY, "oft", 0.7)]), Fidelity::Exact),
    ];
    let modes = [ExecutionMode::Locking, ExecutionMode::Functional];
    let jobs = kinds.into_iter().flat_map(|(job, fidelity)| {
        modes.map(|mode| {
            let mut job = job.clone();
            (job.options.mode, job.options.fidelity) = (Some(mode), Some(fidelity));
            job
        })
    });
    jobs.collect()
}

fn encoded(execution: &Modes, model: &LoadedModel, job: &EncodeJob) -> Vec<Conditioning> {
    execution.encode(model, job).unwrap().conditionings
}

/// Whether a run succeeds that meets `ending` when it looks for the weight number `at`.
fn ends(job: &CheckedJob<'_>, ending: Ending, at: usize) -> bool {
    let count = Cell::new(0);
    let watch: Watch<'_> = &|| {
        count.set(count.get() + 1);
        match ending {
            _ if count.get() <= at => Ok(()),
            Ending::Error => candle_core::bail!("the device failed"),
            Ending::Panic => panic!("a defect"),
        }
    };
    let run = || locking::encode(job, watch, &Tally::default());
    catch_unwind(AssertUnwindSafe(run)).is_ok_and(|result| result.is_ok())
}
