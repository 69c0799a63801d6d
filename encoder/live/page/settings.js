// The sliders: built from what the engine can, acting at once.
//
//   const settings = new Settings(element, changed);
//   settings.build({swap: {min: 1, max: 5, step: 1, value: 3}, size: {choices: [64, 128], value: 64}});
//   settings.values(still)                     // {swap: 3, size: 64}; style: one of some names

const times = (value) => Number(value).toFixed(2);
const TEXTS = {
  swap: ["Drawn blocks", "more: less of the photo", (v) => String(v)],
  colours: ["Own colours", "0: those of the photo", (v) => `${Math.round(100 * v)} %`],
  truncation: ["Likeness", "0: the average face", times],
  refine: ["Refine", "closer to a still; slow", (v) => (v ? `${v} steps` : "off")],
  size: ["Size", "larger is slower", (v) => `${v} px`],
};
const STYLE = "style"; // not a number: buttons, of which one is pressed

export class Settings {
  constructor(element, changed) {
    this.element = element;
    this.changed = changed;
    this.sliders = new Map(); // name -> {input, value(), stillOnly}
  }

  build(given) {
    this.element.replaceChildren();
    this.sliders.clear();
    if (given[STYLE]) this.sliders.set(STYLE, this.buttons(STYLE, given[STYLE]));
    for (const name of Object.keys(TEXTS).filter((known) => given[known])) {
      this.sliders.set(name, this.slider(name, given[name]));
    }
  }

  /** A choice between names: radio buttons, which arrow keys go through. */
  buttons(name, { value, choices }) {
    const row = element("fieldset", { className: "styles" });
    row.append(element("legend", { textContent: "Style" }));
    for (const choice of choices) {
      const input = element("input", { type: "radio", name, value: choice, id: `set-${name}-${choice}` });
      input.checked = input.defaultChecked = choice === value;
      input.onchange = () => this.changed();
      const label = element("label", { htmlFor: input.id, textContent: capitalised(choice) });
      row.append(input, label);
    }
    this.element.append(row);
    const chosen = () => row.querySelector("input:checked").value;
    return { input: row, chosen, write: () => {}, row, stillOnly: false };
  }

  slider(name, { min, max, step, value, choices, still: stillOnly = false }) {
    const [label, hint, shown] = TEXTS[name];
    const input = element("input", { type: "range", id: `set-${name}` });
    // a choice is a slider over its number
    Object.assign(input, choices ? { min: 0, max: choices.length - 1, step: 1 } : { min, max, step });
    input.value = input.defaultValue = String(choices ? choices.indexOf(value) : value);
    input.setAttribute("aria-describedby", `hint-${name}`);
    const chosen = () => (choices ? choices[Number(input.value)] : Number(input.value));
    const output = element("output", { htmlFor: input.id });
    const write = () => {
      output.textContent = shown(chosen());
      input.setAttribute("aria-valuetext", output.textContent);
      const part = (Number(input.value) - input.min) / (input.max - input.min || 1);
      input.style.setProperty("--part", part);
    };
    input.oninput = () => {
      write();
      this.changed();
    };
    write();
    const title = element("label", { htmlFor: input.id, textContent: label });
    const text = element("p", { id: `hint-${name}`, className: "hint", textContent: hint });
    const row = element("div", { className: "setting" });
    row.append(title, output, input, text);
    this.element.append(row);
    return { input, chosen, write, row, stillOnly };
  }

  values(still) {
    const chosen = [...this.sliders].filter(([, { stillOnly }]) => still || !stillOnly);
    return Object.fromEntries(chosen.map(([name, slider]) => [name, slider.chosen()]));
  }

  /** Whether a still is shown: some settings are for stills only. */
  still(shown) {
    for (const { input, row, stillOnly } of this.sliders.values()) {
      input.disabled = stillOnly && !shown;
      row.classList.toggle("off", input.disabled);
    }
  }

  reset() {
    for (const { write } of this.sliders.values()) write();
    this.changed();
  }
}

const capitalised = (word) => word[0].toUpperCase() + word.slice(1);

function element(name, properties) {
  const { htmlFor, ...others } = properties;
  const made = Object.assign(document.createElement(name), others);
  if (htmlFor) made.setAttribute("for", htmlFor);
  return made;
}
