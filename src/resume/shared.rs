//! What the first of several ranks goes on from, on all of them.
//!
//! In: on the first rank, what it read; on the others, nothing. Out: the same on each, bit for bit. Only the first needs to reach the file.

use std::borrow::Cow;

use panacea_formats::json::{canonical, parse_strict};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ResumeError, from_bits, to_bits};
use crate::model::TargetTensors;
use crate::optimize::{State, Trial};
use crate::ranks::Group;

/// The state of the first rank of `group`; what others pass as theirs is dropped.
///
/// # Errors
/// [`ResumeError::Ranks`].
pub fn share(
    group: &Group,
    own: Option<State<'static>>,
) -> Result<Option<State<'static>>, ResumeError> {
    if group.size() == 1 {
        return Ok(own);
    }
    let own = own.filter(|_| group.is_first());
    let outline = own.as_ref().map(Outline::of).transpose()?;
    let Some(outline) = from_first(group, &outline)? else {
        return Ok(None);
    };
    let mut state = match own {
        Some(state) => state,
        None => outline.zeros()?,
    };
    for (_, tensors) in &mut state.tensors {
        for target in tensors.to_mut().iter_mut() {
            group.broadcast(target)?;
        }
    }
    Ok(Some(state))
}

/// The trials of the first rank of `group`; what others pass as theirs is dropped.
///
/// # Errors
/// [`ResumeError::Ranks`].
pub fn share_trials(group: &Group, own: Vec<Trial>) -> Result<Vec<Trial>, ResumeError> {
    match group.size() {
        1 => Ok(own),
        _ => from_first(group, &own),
    }
}

/// A state without its elements.
#[derive(Serialize, Deserialize)]
struct Outline {
    /// With numbers as their bits.
    steps: Vec<Value>,
    /// The name of each list of tensors, and the number of elements of each target.
    tensors: Vec<(String, Vec<usize>)>,
}

impl Outline {
    fn of(state: &State<'_>) -> Result<Self, ResumeError> {
        Ok(Self {
            steps: state.steps.iter().map(to_bits).collect::<Result<_, _>>()?,
            tensors: state
                .tensors
                .iter()
                .map(|(name, tensors)| (name.clone(), tensors.iter().map(<[f32]>::len).collect()))
                .collect(),
        })
    }

    fn zeros(self) -> Result<State<'static>, ResumeError> {
        let zeros = |(name, sizes): (String, Vec<usize>)| {
            let tensors = sizes.into_iter().map(|size| vec![0.0; size]).collect();
            (name, Cow::Owned(TargetTensors::new(tensors)))
        };
        Ok(State {
            steps: self
                .steps
                .into_iter()
                .map(from_bits)
                .collect::<Result<_, _>>()?,
            tensors: self.tensors.into_iter().map(zeros).collect(),
        })
    }
}

/// `own` of the first rank, with numbers bit for bit.
fn from_first<T: Serialize + DeserializeOwned>(group: &Group, own: &T) -> Result<T, ResumeError> {
    let text = match group.is_first() {
        true => canonical(&to_bits(own)?),
        false => String::new(),
    };
    let words = group.exchange("what to go on from", text.as_bytes())?;
    let text = String::from_utf8_lossy(&words[0]);
    let value = parse_strict(&text)?;
    Ok(from_bits(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alone_everything_stays_as_it_is() {
        let state = State::default();
        let group = Group::default();
        assert_eq!(share(&group, Some(state.clone())).unwrap(), Some(state));
        assert_eq!(share(&group, None).unwrap(), None);
        assert_eq!(share_trials(&group, Vec::new()).unwrap(), []);
    }
}
