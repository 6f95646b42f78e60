//! What a person is told when something fails: what failed, why, and what to do about it.

use serde::{Deserialize, Serialize};

use crate::helper::{HelperError, protocol};

/// Exit codes of the command line: a contract with scripts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u8", from = "u8")]
pub enum Exit {
    /// 0: done.
    Done,
    /// 1: failed.
    #[default]
    Failed,
    /// 2: the command line was wrong.
    Usage,
    /// 3: there is no daemon.
    NoDaemon,
    /// 4: the cluster refused: who you are, what you may, or its admission.
    Refused,
}

impl From<Exit> for u8 {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::NoDaemon => 3,
            Exit::Refused => 4,
        }
    }
}

impl From<u8> for Exit {
    fn from(code: u8) -> Self {
        match code {
            0 => Self::Done,
            2 => Self::Usage,
            3 => Self::NoDaemon,
            4 => Self::Refused,
            _ => Self::Failed,
        }
    }
}

/// A failure in three parts. Crosses the control socket, and is an object of `--output json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{error}")]
pub struct Failure {
    /// What failed.
    pub error: String,
    /// The chain of causes, nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub because: Vec<String>,
    /// What to do about it.
    #[serde(rename = "try", default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// The exit code of the command.
    #[serde(default)]
    pub exit: Exit,
}

impl Failure {
    /// `error` says what failed, e.g. "cannot intercept cart in shop".
    pub fn new(error: impl Into<String>) -> Self {
        Self { error: error.into(), because: Vec::new(), advice: None, exit: Exit::Failed }
    }

    /// With one more cause.
    #[must_use]
    pub fn because(mut self, cause: impl ToString) -> Self {
        self.because.push(cause.to_string());
        self
    }

    /// With an error and all its sources as causes.
    #[must_use]
    pub fn caused_by(mut self, error: &(dyn std::error::Error + 'static)) -> Self {
        self.because.extend(chain(error));
        self
    }

    /// With what to do about it.
    #[must_use]
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// With another exit code than 1.
    #[must_use]
    pub fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// Error and causes in one line, for logs and status.
    pub fn one_line(&self) -> String {
        std::iter::once(&self.error).chain(&self.because).map(String::as_str).collect::<Vec<_>>().join(": ")
    }

    /// The same failure seen from further up: `error` becomes the headline, the former one the first cause.
    #[must_use]
    pub fn while_doing(mut self, error: impl Into<String>) -> Self {
        self.because.insert(0, std::mem::replace(&mut self.error, error.into()));
        self
    }
}

impl From<HelperError> for Failure {
    fn from(error: HelperError) -> Self {
        match error {
            HelperError::Failed(failure) => failure.into(),
            other => Self::new("the privileged helper does not do its part").caused_by(&other),
        }
    }
}

impl From<protocol::Failure> for Failure {
    fn from(failure: protocol::Failure) -> Self {
        let advice = Some(failure.try_).filter(|advice| !advice.is_empty());
        Self { error: failure.error, because: vec![failure.because], advice, exit: Exit::Failed }
    }
}

/// An error and its sources as text, without those that only repeat the one before.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> Vec<String> {
    let mut causes: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        // Many libraries print their source within their own text, others do not.
        if !causes.last().is_some_and(|last| last.contains(&text)) {
            causes.push(text);
        }
        next = error.source();
    }
    causes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_crosses_the_socket_unchanged_and_names_its_parts() {
        let failure = Failure::new("cannot intercept cart")
            .because("forktargets is forbidden")
            .advice("ask for the role forkd-edit")
            .exit(Exit::Refused);
        let json = serde_json::to_string(&failure).unwrap();
        assert_eq!(
            json,
            r#"{"error":"cannot intercept cart","because":["forktargets is forbidden"],"try":"ask for the role forkd-edit","exit":4}"#
        );
        assert_eq!(serde_json::from_str::<Failure>(&json).unwrap(), failure);
    }

    #[test]
    fn causes_that_repeat_each_other_are_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer: {0}")]
        struct Outer(#[source] std::io::Error);
        let io = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "connection refused");
        assert_eq!(chain(&Outer(io)), ["outer: connection refused"]);
    }
}
