//! Words and JSON: the only place that prints.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use forkd_daemon::control::Reply;
use forkd_daemon::failure::{Exit, Failure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::args::{Global, Output};

/// Where and how to speak. Answers go to stdout, everything else to stderr.
pub struct Ui {
    json: bool,
    colour: bool,
    /// On a terminal: one line that is replaced.
    spinner: Option<ProgressBar>,
    /// Elsewhere: the last line, so that none is said twice in a row.
    said: Cell<String>,
}

impl Ui {
    /// As the command line and the terminal want it.
    pub fn new(global: &Global) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let colour = terminal
            && !global.no_color
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        Self { json: global.output == Output::Json, colour, spinner: None, said: Cell::default() }
            .with_spinner(terminal)
    }

    fn with_spinner(mut self, terminal: bool) -> Self {
        if terminal && !self.json {
            let bar = ProgressBar::new_spinner();
            let style = if self.colour { "{spinner:.cyan} {msg}" } else { "{spinner} {msg}" };
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            self.spinner = Some(bar);
        }
        self
    }

    /// What is being done at the moment.
    pub fn step(&self, message: &str) {
        match &self.spinner {
            Some(bar) => {
                bar.set_message(message.to_owned());
                bar.enable_steady_tick(Duration::from_millis(100));
            }
            None if !self.json && self.said.replace(message.to_owned()) != message => {
                self.line(&format!("  {message}"));
            }
            None => {}
        }
    }

    /// Something to know that stays true.
    pub fn note(&self, message: &str) {
        if self.json {
            return;
        }
        let head = self.paint("33", "note:");
        self.line(&format!("{head} {message}"));
    }

    /// What the daemon says along the way.
    pub fn hear(&self, reply: &Reply) {
        match reply {
            Reply::Progress { message } => self.step(message),
            Reply::Note { message } => self.note(message),
            Reply::Done { .. } | Reply::Error(_) => {}
        }
    }

    /// The work is over: no spinner beneath what comes now.
    pub fn settle(&self) {
        if let Some(bar) = &self.spinner {
            bar.disable_steady_tick();
            bar.finish_and_clear();
        }
    }

    /// The answer: `value` as JSON, or `words`.
    pub fn answer(&self, value: &impl Serialize, words: impl FnOnce() -> String) -> Result<(), Failure> {
        self.settle();
        let text = if self.json {
            serde_json::to_string_pretty(value)
                .map_err(|error| Failure::new("cannot write the answer as JSON").caused_by(&error))?
        } else {
            words()
        };
        self.print(&text)
    }

    /// Text for stdout as it is, e.g. YAML or a script.
    pub fn print(&self, text: &str) -> Result<(), Failure> {
        self.settle();
        let mut out = std::io::stdout().lock();
        let written = out.write_all(text.trim_end().as_bytes()).and_then(|()| out.write_all(b"\n"));
        match written.and_then(|()| out.flush()) {
            // `forkd status | head -1`: the reader has seen enough.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(|error| Failure::new("cannot write the answer").caused_by(&error)),
        }
    }

    /// A failure, and the exit code it means.
    pub fn fail(&self, failure: &Failure) -> Exit {
        self.settle();
        let text = if self.json {
            serde_json::to_string(failure).unwrap_or_else(|_| failure.error.clone())
        } else {
            self.words(failure)
        };
        self.line(&text);
        failure.exit
    }

    /// Is the answer to be JSON?
    pub fn json(&self) -> bool {
        self.json
    }

    /// Bold, where there is colour.
    pub fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    fn words(&self, failure: &Failure) -> String {
        let mut text = format!("{} {}", self.paint("1;31", "error:"), failure.error);
        for cause in &failure.because {
            text += &format!("\n{} {}", self.paint("1", "because:"), indent(cause, 9));
        }
        if let Some(advice) = &failure.advice {
            text += &format!("\n{} {}", self.paint("1;32", "try:"), indent(advice, 5));
        }
        text
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn line(&self, text: &str) {
        match &self.spinner {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

/// Further lines of a text under its first.
fn indent(text: &str, by: usize) -> String {
    text.trim().replace('\n', &format!("\n{:by$}", ""))
}

/// A table with as much room per column as it needs; the first row is the head.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("   ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ui(json: bool) -> Ui {
        Ui { json, colour: false, spinner: None, said: Cell::default() }
    }

    #[test]
    fn a_failure_has_three_parts_and_keeps_lines_together() {
        let failure = Failure::new("cannot intercept cart")
            .because("not ready after 60 s\nAgentStarting")
            .because("image not found")
            .advice("look at the pod");
        assert_eq!(
            ui(false).words(&failure),
            "error: cannot intercept cart\nbecause: not ready after 60 s\n         AgentStarting\nbecause: image not found\ntry: look at the pod"
        );
    }

    #[test]
    fn a_table_is_as_wide_as_its_widest_cells() {
        let rows = [vec!["NAME".to_owned(), "X".to_owned()], vec!["cart".to_owned(), "10.96.0.1".to_owned()]];
        assert_eq!(table(&rows), "NAME   X\ncart   10.96.0.1");
    }
}
