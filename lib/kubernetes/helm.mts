// What Helm keeps of a release in the cluster, and values as it reads them.
import { gunzipSync } from 'node:zlib'
import { Document, isMap, Scalar } from 'yaml'
import type { ApiObject, Kubectl } from './kubectl.mts'

/** One value of a chart. */
export interface HelmValue {
  /** With dots: "ipam.mode". */
  name: string
  value: unknown
  /** Why it is set, and not left as the chart has it. */
  why: string
}

/** The latest revision of a release. */
export interface HelmRelease {
  revision: number
  /** deployed, failed, pending-install, pending-upgrade, … */
  status: string
  chartVersion: string
  /** The values that were given, nested; not the chart's own. */
  values: Record<string, unknown>
  /** The Secret that is its record. */
  secret: string
}

/** As much of a record as is looked at. */
interface Release {
  version: number
  info: { status: string }
  chart: { metadata: { version: string } }
  config?: Record<string, unknown>
}

interface Secret extends ApiObject {
  data: { release: string }
}

/**
 * Reads a release's latest revision. Helm writes each as a Secret: JSON, gzipped, base64 (and
 * once more base64, as every Secret), see https://helm.sh/docs/topics/advanced/#storage-backends
 *
 * @returns undefined if there is no such release
 */
export async function helmRelease(
  kubectl: Kubectl,
  name: string,
  namespace: string,
): Promise<HelmRelease | undefined> {
  const { items } = await kubectl.get<{ items: Secret[] }>(
    'secrets',
    `--namespace=${namespace}`,
    `--selector=owner=helm,name=${name}`,
  )
  const revisions = items.map(({ metadata, data }) => {
    const packed = Buffer.from(Buffer.from(data.release, 'base64').toString(), 'base64')
    const release = JSON.parse(gunzipSync(packed).toString()) as Release
    return {
      revision: release.version,
      status: release.info.status,
      chartVersion: release.chart.metadata.version,
      values: release.config ?? {},
      secret: metadata.name,
    }
  })
  return revisions.sort((a, b) => b.revision - a.revision)[0]
}

/** The names of those values that a release was not given, or given otherwise. */
export function differingValues(values: readonly HelmValue[], release: HelmRelease): string[] {
  const given = ({ name }: HelmValue) =>
    name
      .split('.')
      .reduce<unknown>(
        (inner, part) => (inner as Record<string, unknown> | undefined)?.[part],
        release.values,
      )
  return values
    .filter((each) => JSON.stringify(given(each)) !== JSON.stringify(each.value))
    .map(({ name }) => name)
}

/** Values as a file for Helm, each with its reason above it. */
export function valuesFile(values: readonly HelmValue[]): string {
  const document = new Document({})
  for (const { name, value, why } of values) {
    const path = name.split('.')
    document.setIn(path, value)
    const parent = path.length > 1 ? document.getIn(path.slice(0, -1)) : document.contents
    const pair = isMap(parent)
      ? parent.items.find(({ key }) => String(key) === path.at(-1))
      : undefined
    if (!pair) throw new Error(`${name} did not become a key of the values`)
    const key = new Scalar(path.at(-1))
    key.commentBefore = ` ${why}`
    pair.key = key
  }
  return document.toString({ lineWidth: 0 })
}
