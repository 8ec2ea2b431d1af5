//! Maps by component as headers carry them, in which naming one component twice is an error.
//!
//! Serde's own maps keep the last of two; that would be an encode with other tokens than asked for.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};

use crate::model::Component;

/// For `deserialize_with` on a map.
pub(crate) fn required<'de, D, V>(deserializer: D) -> Result<BTreeMap<Component, V>, D::Error>
where
    D: Deserializer<'de>,
    V: Deserialize<'de>,
{
    Unique::deserialize(deserializer).map(|Unique(map)| map)
}

/// For `deserialize_with` on a map that may be absent.
pub(crate) fn optional<'de, D, V>(
    deserializer: D,
) -> Result<Option<BTreeMap<Component, V>>, D::Error>
where
    D: Deserializer<'de>,
    V: Deserialize<'de>,
{
    let unique: Option<Unique<V>> = Option::deserialize(deserializer)?;
    Ok(unique.map(|Unique(map)| map))
}

struct Unique<V>(BTreeMap<Component, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueVisitor(PhantomData))
    }
}

struct UniqueVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueVisitor<V> {
    type Value = Unique<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map by component")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Unique<V>, A::Error> {
        let mut map = BTreeMap::new();
        while let Some((component, value)) = access.next_entry::<Component, V>()? {
            if map.insert(component, value).is_some() {
                return Err(A::Error::custom(format!("`{component}` is given twice")));
            }
        }
        Ok(Unique(map))
    }
}
