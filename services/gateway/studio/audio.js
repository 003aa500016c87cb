// Sound in the browser: decoding, recording to WAV, and spectrograms. Knows nothing about the gateway.

const FFT_SIZE = 1024;
const FLOOR_DB = -80;
const TOP_HZ = 8000;

let context;

function audioContext() {
  context ??= new AudioContext();
  return context;
}

/** Samples of a recording's first channel mix, or null where the browser cannot decode it. */
export async function decode(blob) {
  try {
    const buffer = await audioContext().decodeAudioData(await blob.arrayBuffer());
    const samples = new Float32Array(buffer.length);
    for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
      const data = buffer.getChannelData(channel);
      for (let i = 0; i < data.length; i++) samples[i] += data[i] / buffer.numberOfChannels;
    }
    return { samples, rate: buffer.sampleRate, seconds: buffer.duration };
  } catch {
    return null;
  }
}

/** A 16-bit mono WAV file. */
export function wav({ samples, rate }) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, value) => [...value].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true);
  view.setUint16(34, 16, true); text(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, value)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}

/** Starts the microphone; the result's stop() gives a WAV blob, or null where nothing was heard. */
export async function record() {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
  recorder.start();
  return {
    async stop() {
      const ended = new Promise((resolve) => recorder.addEventListener("stop", resolve, { once: true }));
      recorder.stop();
      await ended;
      stream.getTracks().forEach((track) => track.stop());
      const decoded = await decode(new Blob(pieces));
      return decoded && wav(decoded);
    },
  };
}

/** Draws the spectrogram of a decoded recording, 0 to 8 kHz, over `seconds` so that several compare. */
export function spectrogram(canvas, { samples, rate }, seconds) {
  const { width, height } = canvas;
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(width, height);
  const bins = Math.min(FFT_SIZE / 2, Math.round((TOP_HZ / rate) * FFT_SIZE));
  const hop = (seconds * rate) / width;
  const columns = [];
  let loudest = 1e-9;
  for (let x = 0; x < width; x++) {
    const powers = spectrum(samples, Math.round(x * hop) - FFT_SIZE / 2);
    for (let bin = 0; bin < bins; bin++) loudest = Math.max(loudest, powers[bin]);
    columns.push(powers);
  }
  for (let x = 0; x < width; x++) {
    const isInside = x * hop < samples.length;
    for (let y = 0; y < height; y++) {
      const bin = Math.floor(((height - 1 - y) / height) * bins);
      const level = 10 * Math.log10(columns[x][bin] / loudest + 1e-12);
      const [r, g, b] = isInside ? colour(Math.max(0, 1 - level / FLOOR_DB)) : [13, 11, 30];
      image.data.set([r, g, b, 255], 4 * (y * width + x));
    }
  }
  pen.putImageData(image, 0, 0);
}

const hann = Float32Array.from({ length: FFT_SIZE }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / FFT_SIZE));

function spectrum(samples, start) {
  const real = new Float32Array(FFT_SIZE), imaginary = new Float32Array(FFT_SIZE);
  for (let i = 0; i < FFT_SIZE; i++) real[i] = (samples[start + i] ?? 0) * hann[i];
  fft(real, imaginary);
  return real.subarray(0, FFT_SIZE / 2).map((value, i) => value * value + imaginary[i] * imaginary[i]);
}

function fft(real, imaginary) {
  const n = real.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let size = 2; size <= n; size <<= 1) {
    const angle = (-2 * Math.PI) / size, half = size >> 1;
    for (let k = 0; k < half; k++) {
      const c = Math.cos(angle * k), s = Math.sin(angle * k);
      for (let i = k; i < n; i += size) {
        const j = i + half;
        const re = real[j] * c - imaginary[j] * s, im = real[j] * s + imaginary[j] * c;
        real[j] = real[i] - re; imaginary[j] = imaginary[i] - im;
        real[i] += re; imaginary[i] += im;
      }
    }
  }
}

const STOPS = [[13, 11, 30], [60, 16, 92], [142, 36, 105], [214, 72, 80], [248, 148, 65], [252, 243, 190]];

function colour(level) {
  const place = Math.min(level, 0.999) * (STOPS.length - 1), from = Math.floor(place), share = place - from;
  return STOPS[from].map((value, i) => value + (STOPS[from + 1][i] - value) * share);
}
