// A cluster of namespaces to play with: `npm run cluster` raises it, and with --down takes it away.
import { parseArgs } from 'node:util'
import { describeError } from '../../lib/errors.mts'
import { formatTable } from '../../lib/format.mts'
import { differences } from './differences.mts'
import { cannotRun, keptFolder, raise, takeAway } from './namespace-cluster.mts'

const { values } = parseArgs({ options: { down: { type: 'boolean' } } })
const folder = keptFolder
const reason = cannotRun()
try {
  if (reason) console.error(`skipped: ${reason}`)
  else if (values.down) await takeAway(folder)
  else await up()
} catch (error) {
  console.error(`cluster: ${describeError(error)}`)
  process.exitCode = 1
}

async function up(): Promise<void> {
  const rows = differences().map(({ what, why }) => [what, why])
  console.error(`${formatTable(['differs from a real machine', 'because'], rows)}\n`)
  const { root, path } = await raise({ folder, keep: true })
  console.log(`
cd ${root}
export PATH=${path.join(':')}:$PATH KUBECONFIG=$PWD/configs/admin.kubeconfig
./bin/wait-for-cluster.mts && ./bin/install-cilium.mts --values differences.yaml
(take it away: npm run cluster -- --down)`)
}
