// The role by which the API server may call kubelets. It asks them as user "kubernetes" (the CN
// of its certificate), and each kubelet asks the API server back what this user may.

/**
 * ClusterRole and binding, for `kubectl apply -f -`. Without them logs, exec and port-forward
 * are refused. A kubelet knows every request by one of these subresources of its node and by the
 * HTTP method (GET is get, POST is create), see
 * https://kubernetes.io/docs/reference/access-authn-authz/kubelet-authn-authz/
 */
export const kubeletApiAccess = {
  apiVersion: 'v1',
  kind: 'List',
  items: [
    {
      apiVersion: 'rbac.authorization.k8s.io/v1',
      kind: 'ClusterRole',
      metadata: { name: 'kubelet-api-full' },
      rules: [
        {
          apiGroups: [''],
          resources: ['nodes/proxy', 'nodes/stats', 'nodes/log', 'nodes/spec', 'nodes/metrics'],
          verbs: ['get', 'create'],
        },
      ],
    },
    {
      apiVersion: 'rbac.authorization.k8s.io/v1',
      kind: 'ClusterRoleBinding',
      metadata: { name: 'kubelet-api-full' },
      roleRef: {
        apiGroup: 'rbac.authorization.k8s.io',
        kind: 'ClusterRole',
        name: 'kubelet-api-full',
      },
      subjects: [{ apiGroup: 'rbac.authorization.k8s.io', kind: 'User', name: 'kubernetes' }],
    },
  ],
} as const
