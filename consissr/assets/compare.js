// <compare-images>: two pictures over each other with a divider between them, which a drag, a click or the arrow keys
// move. Attributes: left, right (addresses), left-label, right-label, width, height (pixels of the larger picture),
// left-nearest, right-nearest (enlarge that picture without smoothing). 1:1 is one pixel of the picture per pixel of the
// screen. A click tells where it was, as an event "place" whose detail is [x, y], each 0 to 1.
customElements.define("compare-images", class extends HTMLElement {
  static observedAttributes = ["left", "right", "left-label", "right-label", "width", "height"];

  static inside = `<style>
    :host { display: block; } :host([hidden]) { display: none; }
    .box { position: relative; max-width: 100%; background: #888; cursor: ew-resize; }
    .frame { overflow: auto; max-height: 85vh; } .stage { position: relative; overflow: hidden; }
    img { position: absolute; inset: 0; width: 100%; height: 100%; user-select: none; -webkit-user-drag: none; }
    .large img, :host([left-nearest]) #left, :host([right-nearest]) #right { image-rendering: pixelated; }
    #bar { position: absolute; top: 0; bottom: 0; width: 44px; margin-left: -22px; touch-action: none; pointer-events: none; }
    #bar::before { content: ""; position: absolute; left: 21px; width: 2px; height: 100%; background: #fff; box-shadow: 0 0 3px #000; }
    #bar::after { content: "\\2194"; position: absolute; top: calc(50% - 16px); left: 6px; width: 32px; height: 32px;
      border-radius: 50%; background: #fff; color: #222; font: 20px/32px sans-serif; text-align: center; box-shadow: 0 0 3px #000; }
    @media (pointer: coarse) { #bar { pointer-events: auto; } }
    .tag { position: absolute; top: .4rem; padding: 0 .4rem; border-radius: 3px; background: #000a; color: #fff; font-size: .85em;
      max-width: 42%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; pointer-events: none; }
    .controls { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; margin-top: .4rem; font-size: .9em; }
    input { flex: 1 1 8rem; min-width: 6rem; height: 1.6rem; } select { font: inherit; padding: .2rem; }
  </style>
  <div class="box"><div class="frame"><div class="stage"><img id="right" loading="lazy"><img id="left" loading="lazy"></div></div>
    <div id="bar"></div><span class="tag" id="left-tag" style="left: .4rem"></span><span class="tag" id="right-tag" style="right: .4rem"></span></div>
  <div class="controls"><input type="range" min="0" max="100" value="50" step="any">
    <label>Zoom <select><option value="0">fit</option><option value="1">1:1</option><option value="2">2:1</option><option value="4">4:1</option></select></label></div>`;

  connectedCallback() {
    if (this.shadowRoot) return;
    this.attachShadow({ mode: "open" }).innerHTML = this.constructor.inside;
    const find = selector => this.shadowRoot.querySelector(selector);
    Object.assign(this, { box: find(".box"), frame: find(".frame"), stage: find(".stage"), at: find("input"), zoom: find("select"), controls: find(".controls") });
    this.at.oninput = this.frame.onscroll = () => this.divide();
    this.zoom.onchange = () => this.resize();
    new ResizeObserver(() => this.resize()).observe(this);
    for (const part of [this.stage, find("#bar")]) part.onpointerdown = event => {
      if (event.button || (part === this.stage && event.pointerType !== "mouse")) return;  // a finger there scrolls
      part.setPointerCapture(event.pointerId);
      part.onpointermove = move => this.follow(move);
      part.onpointerup = part.onpointercancel = () => { part.onpointermove = null; };
      this.follow(event);
      event.preventDefault();
    };
    this.stage.onclick = event => {
      const { left, top, width, height } = this.stage.getBoundingClientRect();
      this.dispatchEvent(new CustomEvent("place", { detail: [(event.clientX - left) / width, (event.clientY - top) / height] }));
    };
    this.attributeChangedCallback();
  }

  attributeChangedCallback(name) {
    if (!this.shadowRoot || !this.getAttribute("width")) return;
    const labels = {};
    for (const side of ["left", "right"]) {
      const picture = this.shadowRoot.getElementById(side);
      if (picture.getAttribute("src") !== this.getAttribute(side)) picture.src = this.getAttribute(side);
      labels[side] = picture.alt = this.shadowRoot.getElementById(side + "-tag").textContent = this.getAttribute(side + "-label");
    }
    this.at.setAttribute("aria-label", `divider between ${labels.left} and ${labels.right}`);
    if (!name || name === "width" || name === "height") this.resize();
  }

  resize() {  // keeps what is in the middle there
    const width = this.getAttribute("width"), height = this.getAttribute("height"), pixel = 1 / devicePixelRatio;
    const room = this.clientWidth, { frame, stage } = this;
    if (!room) return;
    if (!this.chosen) {  // at first 1:1, larger only where that would be tiny
      this.chosen = true;
      this.zoom.value = [1, 2, 4].find(zoom => width * zoom * pixel >= room / 3) || 4;
    }
    const zoom = Number(this.zoom.value);
    const middle = [(frame.scrollLeft + frame.clientWidth / 2) / stage.clientWidth || .5, (frame.scrollTop + frame.clientHeight / 2) / stage.clientHeight || .5];
    const wide = zoom ? width * zoom * pixel : Math.min(room, innerHeight * .85 * width / height);
    this.box.style.width = stage.style.width = wide + "px";
    this.controls.style.maxWidth = Math.max(wide, 280) + "px";
    stage.style.height = wide * height / width + "px";
    stage.className = zoom > 1 ? "stage large" : "stage";
    frame.scrollLeft = middle[0] * wide - frame.clientWidth / 2;
    frame.scrollTop = middle[1] * wide * height / width - frame.clientHeight / 2;
    this.divide();
  }

  follow(event) {
    const place = this.frame.getBoundingClientRect();
    this.at.value = (event.clientX - place.left) / this.frame.clientWidth * 100;
    this.divide();
  }

  divide() {  // the divider stands in what is seen of the picture, wherever that is scrolled to
    const { frame, stage } = this, at = this.at.value / 100 * frame.clientWidth;
    this.shadowRoot.getElementById("bar").style.left = at + "px";
    this.shadowRoot.getElementById("left").style.clipPath = `inset(0 ${stage.clientWidth - frame.scrollLeft - at}px 0 0)`;
  }
});
