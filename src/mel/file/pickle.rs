//! Stands in until branch `files` arrives.
