//! Everything that clients ask for: a fixed list of texts with stacks of LoRAs, the same in every
//! run, so that whoever knows the entry knows the answer.

use std::{path::PathBuf, time::Duration};

use fixtures::Size;
use luna_client::{AdapterId, EncodeRequest, ExecutionMode, StackEntry};
use luna_e2e::{golden::tiny_lora, models};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

/// LoRA files and what is asked for with them.
#[derive(Debug)]
pub(crate) struct Catalogue {
    pub(crate) loras: Vec<Lora>,
    entries: Vec<Entry>,
}

/// A LoRA file.
#[derive(Debug)]
pub(crate) struct Lora {
    pub(crate) path: PathBuf,
    model: &'static str,
    /// Whether clients upload it while the faults happen; the others are there from the start.
    pub(crate) is_late: bool,
}

/// One thing to ask for.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    model: &'static str,
    text: String,
    stack: Vec<Applied>,
    hook: Option<Applied>,
    clip_skip: Option<i32>,
}

/// A LoRA of the catalogue with its strengths.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Applied {
    lora: usize,
    strength_patch: f64,
    strength_model: f64,
}

impl Catalogue {
    /// A catalogue of `count` entries. A longer one begins as a shorter one does.
    pub(crate) fn new(count: usize) -> Self {
        let loras = loras();
        let mut random = StdRng::seed_from_u64(SEED);
        let entries = (0..count).map(|number| entry(number, &loras, &mut random)).collect();
        Self { loras, entries }
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// An entry at random; some are asked for far more often than others.
    pub(crate) fn pick(&self, random: &mut StdRng) -> usize {
        let hot = random.random_ratio(1, 3);
        random.random_range(0..if hot { HOT.min(self.len()) } else { self.len() })
    }

    /// The LoRAs of an entry.
    pub(crate) fn loras_of(&self, entry: usize) -> impl Iterator<Item = usize> + '_ {
        let Entry { stack, hook, .. } = &self.entries[entry];
        stack.iter().chain(hook).map(|applied| applied.lora)
    }

    /// The request for an entry, where LoRA `n` is `adapters[n]`. Every request of the load and of
    /// the oracle is made here. `variation` changes what does not change the embeddings.
    pub(crate) fn request(
        &self,
        entry: usize,
        adapters: &[AdapterId],
        budget: Duration,
        variation: Option<&mut StdRng>,
    ) -> EncodeRequest {
        let Entry { model, text, stack, hook, clip_skip } = &self.entries[entry];
        let applied = |applied: &Applied| StackEntry {
            adapter: adapters[applied.lora],
            strength_patch: applied.strength_patch,
            strength_model: applied.strength_model,
        };
        let mut request =
            EncodeRequest::new(*model).prompt(text).mode(ExecutionMode::Functional).timeout(budget);
        request = stack.iter().fold(request, |request, it| request.stack_entry(applied(it)));
        request = hook.iter().fold(request, |request, it| request.hook(applied(it)));
        request = clip_skip.iter().fold(request, |request, layer| request.clip_skip(*layer));
        // Solo answers are computed, and so are half of the others.
        let Some(random) = variation else { return request.no_cache() };
        if random.random_ratio(1, 2) {
            request = request.no_cache();
        }
        if random.random_ratio(1, 4) { request.return_tokens() } else { request }
    }
}

fn loras() -> Vec<Lora> {
    let golden = |family, model| {
        NAMES.map(|name| Lora { path: tiny_lora(family, name), model, is_late: false })
    };
    let seeded = (0..SEEDED).map(|seed| Lora {
        path: models::seeded_lora(Size::Tiny, 1000 + seed as u64, 2 + 2 * (seed % 8)),
        model: SD15,
        is_late: seed >= SEEDED_AT_START,
    });
    golden("sd15", SD15).into_iter().chain(golden("sdxl", SDXL)).chain(seeded).collect()
}

fn entry(number: usize, loras: &[Lora], random: &mut StdRng) -> Entry {
    let model = if random.random_ratio(1, 4) { SDXL } else { SD15 };
    let fitting: Vec<_> = (0..loras.len()).filter(|lora| loras[*lora].model == model).collect();
    let mut applied = || Applied {
        lora: fitting[random.random_range(0..fitting.len())],
        strength_patch: STRENGTHS[random.random_range(0..STRENGTHS.len())],
        strength_model: if random.random_ratio(1, 8) { 0.9 } else { 1.0 },
    };
    let stack = (0..number % 4).map(|_| applied()).collect();
    let hook = (number % 7 == 3).then(applied);
    let clip_skip = random.random_ratio(1, 6).then_some(-2);
    Entry { model, text: text(number, random), stack, hook, clip_skip }
}

/// Texts of every length: none, a line, more than one chunk of 77 tokens.
fn text(number: usize, random: &mut StdRng) -> String {
    match random.random_range(0..8) {
        0 => String::new(),
        1 => format!("blurry, ugly, ((worst quality)), {number}"),
        2 => vec![format!("a (red:1.{number}) fox, [soft] light"); 20].join(", "),
        3 => format!("un renard n° {number} (à l'aube:0.8), 狐"),
        _ => format!("a (red:1.2) fox number {number} on the ((mat))"),
    }
}

const SD15: &str = "tiny";
const SDXL: &str = "tinyxl";

/// Of the entries, not of the faults.
const SEED: u64 = 20;

/// Entries that a third of all requests ask for.
const HOT: usize = 16;

/// LoRAs of every nature: those that read the weight, replace it, or split it.
const NAMES: [&str; 12] = [
    "kohya",
    "kohya_f16",
    "peft",
    "diffusers",
    "loha",
    "lokr",
    "dora",
    "diff",
    "set",
    "glora",
    "oft",
    "boft",
];

/// Further LoRAs, of growing size.
const SEEDED: usize = 40;
const SEEDED_AT_START: usize = 8;

const STRENGTHS: [f64; 6] = [1.0, 0.7, 0.1, -0.4, 1.5, 0.35];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_longer_catalogue_begins_as_a_shorter_one() {
        let loras = loras();
        let make = |count| {
            let mut random = StdRng::seed_from_u64(SEED);
            (0..count).map(|number| entry(number, &loras, &mut random)).collect::<Vec<_>>()
        };
        assert_eq!(make(20)[..10], make(10));
    }

    #[test]
    fn entries_differ_and_use_most_loras() {
        let catalogue = Catalogue::new(256);
        let shown: BTreeSet<_> =
            catalogue.entries.iter().map(|entry| format!("{entry:?}")).collect();
        assert!(shown.len() > 240, "only {} entries differ", shown.len());
        let used: BTreeSet<_> =
            (0..catalogue.len()).flat_map(|entry| catalogue.loras_of(entry)).collect();
        assert!(used.len() > 50, "only {} LoRAs are used", used.len());
        let late = used.iter().filter(|lora| catalogue.loras[**lora].is_late).count();
        assert!(late > 20, "only {late} LoRAs come late");
    }
}
