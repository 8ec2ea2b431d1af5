//! Bad input: each is answered with the right code and a message that names the value, and the
//! worker that was there before answers the next good request with the bytes it gave before.

mod deadlines;
mod frames;
mod limits;
mod loras;
mod models;
mod requests;
mod store;
mod support;
mod uploads;
