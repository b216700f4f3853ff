// Released 402 clients of JavaScript as their users call them, over the sandbox's wallet. Tells a JSON object as payers.py does.
import { NWCClient } from "@getalby/sdk";
import { fetch402 } from "@getalby/lightning-tools/402";
import { Credential, Method, z } from "mppx";
import { Mppx } from "mppx/client";

const { ACCOUNT_URL, MODEL_URL, NWC_URL } = process.env;
const [keys, wish, call] = [process.env.KEYS, process.env.WISH, process.env.CALL].map((text) => JSON.parse(text));
const wallet = new NWCClient({ nostrWalletConnectUrl: NWC_URL });

const lightning = Method.from({
  name: "lightning", intent: "charge",
  schema: { credential: { payload: z.object({ preimage: z.string() }) }, request: z.any() },
});
const paying = Method.toClient(lightning, {
  async createCredential({ challenge }) {
    const { preimage } = await wallet.payInvoice({ invoice: challenge.request.methodDetails.invoice });
    return Credential.serialize({ challenge, payload: { preimage } });
  },
});

async function both(name, post) {
  const told = [];
  for (const [url, headers, body] of [[ACCOUNT_URL, {}, wish], [MODEL_URL, { "x-api-key": keys[name] }, call], [MODEL_URL, { "x-api-key": keys[name] }, call]]) {
    const ask = () => post(url, { method: "POST", headers: { "content-type": "application/json", ...headers }, body: JSON.stringify(body) });
    let answer = await ask();  // one that is busy may offer nothing in time, or not know of a payment yet
    for (let again = 0; again < 4 && [402, 503].includes(answer.status); again++) answer = await ask();
    told.push([answer.status, await answer.json()]);
  }
  return told;
}

const out = {};
out.alby = await both("alby", (url, asked) => fetch402(url, asked, { wallet }));
const mppx = Mppx.create({ methods: [paying], polyfill: false });
out.mppx = await both("mppx", (url, asked) => mppx.fetch(url, asked));
wallet.close();
console.log(JSON.stringify(out));
process.exit(0);
