//! Whether a model refuses what it should, and still does what it did: answers, judged and counted.
//!
//! The path, in the order of the modules:
//!
//! | module | in | out |
//! |---|---|---|
//! | [`answer`] | prompts | what a model says to them: computed here, or by a server |
//! | [`measure`] | rows | what the loss tells of each |
//! | [`judge`] | a request and the answer to it | a [`judge::Verdict`]: refused, complied, incoherent or invalid |
//! | [`task`] | the answer to a task item, and the expected one | whether it is right |
//! | [`figure`] | a value for each row | an estimate with its 95% interval |
//! | [`compare`] | the figures of two checkpoints on the same rows | their difference, with interval and p |
//! | [`suite`] | all that is asked, a judge, and who answers | the scores of one checkpoint |
//! | [`scores`] | the figures of a checkpoint, or of two on the same rows | what is printed, gated and reported |
//! | [`gate`] | scores, and what is demanded of them | which demands are met |
//! | [`junit`], [`summary`] | scores and verdicts on gates | JUnit XML and Markdown for continuous integration |
//!
//! A figure is a share of rows or a mean over them, and keeps its rows, so that two checkpoints can be compared row by row.

pub mod answer;
pub mod compare;
pub mod figure;
pub mod gate;
pub mod journal;
pub mod judge;
pub mod junit;
pub mod measure;
pub mod scores;
pub mod suite;
pub mod summary;
pub mod task;
