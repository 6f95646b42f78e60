//! Placeholder until the laptop side lands.
