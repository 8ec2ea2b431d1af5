//! The known key that was probably meant.

/// Returns the known key nearest to `unknown`, if it is near enough to be what was meant: a few
/// letters off, or the right name under the wrong section.
pub(crate) fn suggestion<'a>(
    unknown: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let distances = known.into_iter().map(|candidate| (distance(unknown, candidate), candidate));
    let (nearest, candidate) = distances.min()?;
    let letters = name(unknown).chars().count();
    (nearest <= (letters / 3).clamp(1, 3)).then_some(candidate)
}

/// Counts letters inserted, left out, replaced or swapped; a wrong section counts as one.
fn distance(left: &str, right: &str) -> usize {
    let whole = strsim::damerau_levenshtein(left, right);
    let names = strsim::damerau_levenshtein(name(left), name(right));
    whole.min(names + usize::from(section(left) != section(right)))
}

fn name(key: &str) -> &str {
    key.rsplit_once('.').map_or(key, |(_, name)| name)
}

fn section(key: &str) -> &str {
    key.rsplit_once('.').map_or("", |(section, _)| section)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [&str; 4] =
        ["broker.port", "broker.queue_max", "worker.weights_dtype", "worker.id"];

    #[test]
    fn a_typing_error_is_recognised() {
        assert_eq!(suggestion("broker.prot", KNOWN), Some("broker.port"));
        assert_eq!(suggestion("broker.queuemax", KNOWN), Some("broker.queue_max"));
        assert_eq!(suggestion("worker.weight_dtype", KNOWN), Some("worker.weights_dtype"));
    }

    #[test]
    fn a_wrong_section_is_recognised() {
        assert_eq!(suggestion("queue_max", KNOWN), Some("broker.queue_max"));
        assert_eq!(suggestion("worker.queue_max", KNOWN), Some("broker.queue_max"));
    }

    #[test]
    fn a_foreign_word_suggests_nothing() {
        assert_eq!(suggestion("broker.colour", KNOWN), None);
        assert_eq!(suggestion("anything", []), None);
    }
}
